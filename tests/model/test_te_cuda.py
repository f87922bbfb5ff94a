"""Transformer Engine's layers and FP8 on a GPU, against the local spec and float64; skipped where there is neither.

Bounds are multiples of what bf16 itself costs the local spec, measured in the same test. A value has a relative
rounding of 2^-9 in bf16, 2^-12 in TF32 (what Transformer Engine makes of fp32), 2^-4 in e4m3 and 2^-3 in e5m2.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch
from rank_pool import RankPool
from tiny_models import in_float64, make, random_sequences, response_logits

from flowrl_mega.checkpoint import load_checkpoint, load_model, save_checkpoint
from flowrl_mega.config import OptimizerSettings
from flowrl_mega.model.fp8_gate import METRICS, Fp8Gate, in_bf16
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.precision import ALIGNMENT
from flowrl_mega.model.weights import named_tensors
from flowrl_mega.parallel import backends
from flowrl_mega.parallel.optimizer import Optimizer, wrap
from flowrl_mega.parallel.packing import PackedBatch, pack

pytestmark = pytest.mark.skipif(not backends.transformer_engine().usable, reason=backends.transformer_engine().why)

LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (40, 60), (20, 44)]
SIZES = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.05,
)  # fmt: skip
RECIPES = ["delayed", "tensorwise", "blockwise"]


@pytest.fixture(scope="module")
def gpu():
    """Runs a function on one rank."""
    pool = RankPool(1)
    yield lambda function, *args: pool.run(function, *args, timeout=240)[0]
    pool.close()


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def folder(request, tmp_path_factory) -> Path:
    return make(request.param, tmp_path_factory.mktemp(request.param), **SIZES, **HEAD.get(request.param, {}))


HEAD = {"qwen3": {"head_dim": 64}}


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


def gradients(path: Path, model: dict[str, Any]) -> dict[str, np.ndarray]:
    """Of the mean log-prob, twice, from the fp32 buffer, under Hugging Face's names."""
    policy = build(path, **model)
    (wrapped,), batch = wrap(policy.stages), packed(policy)
    if model.get("fp8") == "delayed":
        for _ in range(2):
            wrapped(batch).logp.mean().backward()  # makes the scales of the gradients too
    wrapped.zero_grad_buffer()
    for _ in range(2):
        wrapped(batch).logp.mean().backward()
    whole, _ = on_ranks.whole_gradients(policy)
    return {name: g.double().cpu().numpy() for name, g in whole.items() if not name.startswith("partition")}


def error(found: list[np.ndarray], wanted: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(found, wanted, strict=True))


def gradient_error(found: dict[str, np.ndarray], wanted: dict[str, np.ndarray]) -> float:
    """Of the worst tensor, root mean square relative to the tensor's own."""
    assert found.keys() == wanted.keys()
    return max(float(np.linalg.norm(found[name] - g) / np.linalg.norm(g)) for name, g in wanted.items())


def exact(folder: Path) -> list[np.ndarray]:
    """transformers' log-probs in float64."""
    model, found = in_float64(folder), []
    for s in random_sequences(LENGTHS):
        with torch.no_grad():
            logp = response_logits(model, s.prompt, s.response).log_softmax(-1)
        found.append(logp.gather(1, torch.tensor(s.response)[:, None])[:, 0].numpy())
    return found


LOCAL32, LOCAL, TE32, TE = (
    {"spec": spec, "dtype": dtype} for spec in ("local", "te") for dtype in ("fp32", "bf16")
)  # fmt: skip


def test_log_probs(gpu, folder) -> None:
    """Rotary positions, packing and every weight's place: a mistake in any is far beyond rounding."""
    wanted = exact(folder)
    assert error(gpu(scores, folder, LOCAL32), wanted) < 1e-4
    bf16 = error(gpu(scores, folder, LOCAL), wanted)
    assert error(gpu(scores, folder, TE), wanted) < 2 * bf16
    assert error(gpu(scores, folder, TE32), wanted) < bf16 / 2


def test_gradients(gpu, folder) -> None:
    """Added up over two backward passes by the GEMMs themselves."""
    wanted = gpu(gradients, folder, LOCAL32)
    bf16 = gradient_error(gpu(gradients, folder, LOCAL), wanted)
    assert gradient_error(gpu(gradients, folder, TE), wanted) < 2 * bf16
    assert gradient_error(gpu(gradients, folder, TE32), wanted) < bf16 / 2


def supported(recipe: str) -> dict[str, Any]:
    support = backends.fp8_support(recipe)  # type: ignore[arg-type]
    if not support.usable:
        pytest.skip(support.why)
    return {**TE, "fp8": recipe}


@pytest.mark.parametrize("recipe", RECIPES)
def test_fp8_log_probs_and_gradients(recipe, gpu, folder) -> None:
    """Coarser than bf16, so FP8 is on, and by no more than its rounding is coarser."""
    wanted, model = exact(folder), supported(recipe)
    bf16, fp8 = error(gpu(scores, folder, TE), wanted), error(gpu(scores, folder, model), wanted)
    assert bf16 < fp8 < 32 * bf16
    right = gpu(gradients, folder, LOCAL32)
    bf16 = gradient_error(gpu(gradients, folder, TE), right)
    assert bf16 < gradient_error(gpu(gradients, folder, model), right) < 64 * bf16


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


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_gate_really_compares_with_bf16(recipe, gpu, folder, record_property) -> None:
    """Switched off, FP8 leaves the very bits of a policy without it; switched on again, those of before."""
    found = gpu(gated, folder, supported(recipe))
    record_property("figures", found["figures"])
    print(recipe, found["figures"])
    for a, b in zip(found["bf16"], gpu(scores, folder, TE), strict=True):
        assert np.array_equal(a, b)
    for a, b in zip(found["fp8"], found["again"], strict=True):
        assert np.array_equal(a, b)
    sums = [abs(float((a - b).sum())) for a, b in zip(found["fp8"], found["bf16"], strict=True)]
    assert found["figures"][METRICS[0]] == pytest.approx(np.mean(sums), rel=1e-5)
    assert found["figures"]["fp8/residual_diff"] > 0


def saved(path: Path, run_dir: Path, model: dict[str, Any]) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The weights of a policy that was trained for two updates in this precision, and those that the local spec loads
    from its checkpoint."""
    policy = build(path, **model)
    trained, batch = wrap(policy.stages), packed(policy)
    settings = OptimizerSettings(lr=1e-3, warmup_steps=0)
    optimizer = Optimizer(trained, settings, bf16=True, total_updates=9)
    for _ in range(2):
        one_update(trained, optimizer, batch)
    folder = save_checkpoint(run_dir, {"policy": (policy, optimizer)}, {"step": 2}, keep_last=1)
    local = build(path, **LOCAL)
    load_model(local, folder)
    return weights(policy), weights(local)


def resumed(path: Path, run_dir: Path, model: dict[str, Any], kept: dict[str, bool]) -> list[dict[str, np.ndarray]]:
    """The weights after a third update: of a run that goes on, and of one that loads its checkpoint."""
    found = []
    for load in (False, True):
        policy = build(path, **model)
        settings = OptimizerSettings(lr=1e-3, warmup_steps=0, **kept)
        trained, batch = wrap(policy.stages, settings.distributed), packed(policy)
        optimizer = Optimizer(trained, settings, bf16=True, total_updates=9)
        if load:
            load_checkpoint(run_dir / "checkpoints" / "step_2", policy, optimizer)
        else:
            for _ in range(2):
                one_update(trained, optimizer, batch)
            save_checkpoint(run_dir, {"policy": (policy, optimizer)}, {"step": 2}, keep_last=1)
        one_update(trained, optimizer, batch)
        found.append(weights(policy))
    return found


def one_update(model: Any, optimizer: Optimizer, batch: PackedBatch) -> None:
    optimizer.zero_grad()
    (-model[0](batch).logp.mean()).backward()
    model[0].finish_grad_sync()
    optimizer.step(loss_is_finite=True)


def weights(policy: Policy) -> dict[str, np.ndarray]:
    return {name: tensor.float().cpu().numpy() for name, tensor in named_tensors(policy)}


@pytest.mark.parametrize("recipe", ["off", *RECIPES])
def test_checkpoints_load_under_the_local_spec(recipe, gpu, folder, tmp_path) -> None:
    model = TE if recipe == "off" else supported(recipe)
    trained, loaded = gpu(saved, folder, tmp_path, model)
    assert trained.keys() == loaded.keys()
    assert all(np.array_equal(trained[name], loaded[name]) for name in trained)


@pytest.mark.parametrize(
    ("recipe", "params", "kept"),
    [
        ("off", False, {}),
        ("off", False, {"offload": True}),
        ("off", False, {"distributed": True}),
        ("tensorwise", False, {}),
        ("tensorwise", True, {"distributed": True}),
    ],
    ids=["bf16", "offload", "distributed", "tensorwise", "weights in FP8"],
)
def test_a_resumed_run_makes_the_same_update(recipe, params, kept, gpu, folder, tmp_path) -> None:
    """With Transformer Engine's FusedAdam, whose count of steps is its own, wherever moments and weights are kept."""
    model = TE if recipe == "off" else {**supported(recipe), "fp8_params": params}
    through, again = gpu(resumed, folder, tmp_path, model, kept)
    for name, tensor in through.items():
        assert np.abs(tensor - again[name]).max() <= 2**-8 * np.abs(tensor).max(), name
