"""What a rank with Transformer Engine runs; module-level functions, so that they can be sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import on_ranks
import torch
from tiny_models import random_sequences

from flowrl_mega.checkpoint import load_checkpoint, load_model, save_checkpoint
from flowrl_mega.config import OptimizerSettings
from flowrl_mega.model.fp8_gate import Fp8Gate, in_bf16
from flowrl_mega.model.generation import Decoder, _Cache
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.precision import ALIGNMENT
from flowrl_mega.model.weights import WholeWeights, named_tensors
from flowrl_mega.parallel import backends
from flowrl_mega.parallel.optimizer import Optimizer, wrap
from flowrl_mega.parallel.packing import PackedBatch, pack

LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (40, 60), (20, 44)]
SIZES = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.05,
)  # fmt: skip
LOCAL32, LOCAL, TE32, TE = (
    {"spec": spec, "dtype": dtype} for spec in ("local", "te") for dtype in ("fp32", "bf16")
)  # fmt: skip
Tensors = dict[str, np.ndarray]  # under Hugging Face's names


def support(recipe: Any) -> backends.Found:
    return backends.fp8_support(recipe)


def build(path: Path, **model: Any) -> Policy:
    return on_ranks.build(path, "mlp", model={"path": str(path), **model})


def packed(policy: Policy) -> PackedBatch:
    """Padded as FP8 needs it, for all: other shapes of a GEMM have other roundings."""
    return pack(random_sequences(LENGTHS), ALIGNMENT, policy.layout.device)


def logp_of(policy: Policy, batch: PackedBatch) -> list[np.ndarray]:
    """By sequence."""
    parts = policy.score([batch])[0].logp.double().cpu().split(batch.response_cu_seqlens.diff().tolist())
    return [parts[batch.index.tolist().index(i)].numpy() for i in range(len(LENGTHS))]


def scores(path: Path, model: dict[str, Any]) -> list[np.ndarray]:
    policy = build(path, **model)
    batch = packed(policy)
    if model.get("fp8") == "delayed":
        policy.stages[0](batch)  # makes the scales
    return logp_of(policy, batch)


def parameters(path: Path, model: dict[str, Any]) -> set[str]:
    return set(build(path, **model).gpt_parameters())


def decoded(path: Path, model: dict[str, Any]) -> np.ndarray:
    """Logits after a prompt, from the embedded engine's decoder."""
    policy = build(path, **model)
    decoder = Decoder(policy.arch, WholeWeights(policy).gather())
    device = decoder.embedding.device
    cache = _Cache(policy.arch, 1, 8, torch.zeros(1, dtype=torch.long, device=device), decoder.embedding)
    return decoder.logits(torch.tensor([[5, 6, 7]], device=device), cache).detach().cpu().numpy()


def fused_gradients(path: Path, model: dict[str, Any]) -> list[bool]:
    """Whether the layers add their weights' gradients to a buffer, before and after there is one."""
    policy = build(path, **model)
    layers = [m for m in policy.stages[0].modules() if hasattr(m, "fuse_wgrad_accumulation") and hasattr(m, "weight")]
    before = any(layer.fuse_wgrad_accumulation for layer in layers)
    wrap(policy.stages)
    return [bool(layers), before, all(layer.fuse_wgrad_accumulation for layer in layers)]


def gradients(path: Path, model: dict[str, Any], factor: float = 1.0) -> Tensors:
    """Of the mean log-prob, twice, from the fp32 buffer; computed with `factor` times it."""
    policy = build(path, **model)
    (wrapped,), batch = wrap(policy.stages), packed(policy)
    if model.get("fp8") == "delayed":
        for _ in range(2):
            (factor * wrapped(batch).logp.mean()).backward()  # makes the scales of the gradients too
    wrapped.zero_grad_buffer()
    for _ in range(2):
        (factor * wrapped(batch).logp.mean()).backward()
    whole, _ = on_ranks.whole_gradients(policy)
    return {name: g.double().cpu().numpy() / factor for name, g in whole.items() if not name.startswith("partition")}


def gated(path: Path, model: dict[str, Any]) -> dict[str, Any]:
    policy = build(path, **model)
    batch = packed(policy)
    settings = on_ranks.config_for("model", model={"path": "model", **model, "fp8_budget": 1e9}).model
    gate = Fp8Gate(policy, settings, length_norm=True)
    gate.before_training(1, batch, 1.0)
    figures = gate.after_step(1, batch, 1.0)
    fp8 = logp_of(policy, batch)
    with in_bf16(policy):
        bf16 = logp_of(policy, batch)
    return {"figures": figures, "fp8": fp8, "bf16": bf16, "again": logp_of(policy, batch)}


class Trained(NamedTuple):
    """Weights, whose checkpoint has the first ones."""

    saved: Tensors
    after: Tensors  # the third update


def train(path: Path, run_dir: Path, model: dict[str, Any], kept: dict[str, bool]) -> Trained:
    """Two updates, a checkpoint, and a third one."""
    policy, optimizer, update = _trainer(path, model, kept)
    update()
    update()
    saved = weights(policy)
    save_checkpoint(run_dir, {"policy": (policy, optimizer)}, {"step": 2}, keep_last=1)
    update()
    return Trained(saved, weights(policy))


def go_on(path: Path, run_dir: Path, model: dict[str, Any], kept: dict[str, bool]) -> Trained:
    """The third one of a run that has loaded the checkpoint."""
    policy, optimizer, update = _trainer(path, model, kept)
    load_checkpoint(run_dir / "checkpoints" / "step_2", {"policy": (policy, optimizer)})
    saved = weights(policy)
    update()
    return Trained(saved, weights(policy))


def _trainer(path: Path, model: dict[str, Any], kept: dict[str, bool]) -> tuple[Policy, Optimizer, Any]:
    policy = build(path, **model)
    settings = OptimizerSettings(lr=1e-3, warmup_steps=0, **kept)
    trained, batch = wrap(policy.stages, settings.distributed), packed(policy)
    optimizer = Optimizer(trained, settings, bf16=True, total_updates=9)

    def update() -> None:
        optimizer.zero_grad()
        (-trained[0](batch).logp.mean()).backward()
        trained[0].finish_grad_sync()
        optimizer.step(loss_is_finite=True)

    return policy, optimizer, update


def weights(policy: Policy) -> Tensors:
    return {name: tensor.float().cpu().numpy().copy() for name, tensor in named_tensors(policy)}


def loaded_as_model(path: Path, run_dir: Path, model: dict[str, Any]) -> Tensors:
    """The weights that a new run takes from the checkpoint."""
    policy = build(path, **model)
    load_model(policy, run_dir / "checkpoints" / "step_2")
    return weights(policy)


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def relative(found: Tensors, wanted: Tensors) -> float:
    """Of the worst tensor, root mean square relative to the tensor's own."""
    assert found.keys() == wanted.keys()
    return max(float(np.linalg.norm(found[name] - w) / np.linalg.norm(w)) for name, w in wanted.items())
