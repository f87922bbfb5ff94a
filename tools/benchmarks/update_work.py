"""The work of tools/benchmarks/update.py: shapes, precisions, recorded rollouts, floating-point operations."""

from __future__ import annotations

import time
from typing import Any, NamedTuple

import torch

from flowrl_mega import objectives
from flowrl_mega.config import Config
from flowrl_mega.experience import MicroBatch
from flowrl_mega.learner import Learner, Models
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.fp8_gate import Fp8Gate
from flowrl_mega.model.logits_budget import LogitsBudget
from flowrl_mega.model.policy import Policy
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.packing import Sequence, plan
from flowrl_mega.settings import validated
from flowrl_mega.train import Trainer

PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": {"dtype": "fp32"},
    "bf16-local": {"dtype": "bf16", "spec": "local"},
    "bf16": {"dtype": "bf16", "spec": "te"},
    **{r: {"dtype": "bf16", "spec": "te", "fp8": r} for r in ("delayed", "tensorwise", "blockwise")},
}
# FP8 in every layer of the cut model: the first and last, which stay in bf16 otherwise, are 2 of its 8 but 2 of a
# whole 7B model's 28.
ALL_LAYERS = {"fp8_first_last_bf16": False}


def _shape(layers: int, hidden: int, heads: int, kv_heads: int, ffn: int, vocab: int, tied: bool) -> Architecture:
    """A Qwen2 of this size."""
    head_dim = hidden // heads
    exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
    return Architecture(
        model_type="qwen2", layers=layers, hidden=hidden, heads=heads, kv_heads=kv_heads, head_dim=head_dim, ffn=ffn,
        vocab=vocab, max_positions=32768, norm_eps=1e-6, init_std=0.02, tied=tied, qkv_bias=True, qk_norm=False,
        inv_freq=1.0 / 1e6**exponent,
    )  # fmt: skip


SHAPES = {
    # Qwen2.5-7B's layers, 8 of 28, and as large a part of its 152064 tokens: the head's share of the work stays.
    "7b-layers": _shape(8, 3584, 28, 4, 18944, 43520, tied=False),
    "1.5b": _shape(28, 1536, 12, 2, 8960, 151936, tied=True),  # Qwen2.5-1.5B, whole
    "tiny": _shape(2, 64, 4, 2, 96, 160, tied=False),
}
# Dense, TFLOP/s: NVIDIA's H100 and H200 data sheets, SXM (half of what they print "with sparsity").
PEAKS = {"H100 80GB HBM3": (989.4, 1978.9), "H200": (989.4, 1978.9)}


def peak_tflops(gpu: str | None, precision: str) -> float | None:
    """Of this GPU in bf16, or in FP8; None where it is not known."""
    for name, (bf16, fp8) in PEAKS.items():
        if gpu and name in gpu and precision != "fp32":
            return fp8 if "fp8" in PRECISIONS[precision] else bf16
    return None


class Work(NamedTuple):
    """One update: as many rollouts of this many tokens, in micro-batches of at most so many rows."""

    sequences: int
    prompt: int
    response: int
    tokens_per_microbatch: int

    @property
    def rows(self) -> int:
        """Of one sequence: its last token is no input."""
        return self.prompt + self.response - 1


def training_flops(arch: Architecture, work: Work) -> dict[str, float]:
    """Floating-point operations of one update that the model asks for; what is computed twice counts once.

    Matrices: 6 N a row (2 forward, 4 backward; Kaplan et al., arXiv 2001.08361; PaLM, arXiv 2204.02311, appendix B),
    for the head of response rows alone, since only these are multiplied with it. Attention: PaLM's 12 x heads x
    head_dim x length a row and layer, halved, since a causal row looks at half of its sequence on average. Norms, the
    rotary embedding, the partition function and the optimizer are left out.
    """
    query, key_value = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    layer = arch.hidden * (2 * query + 2 * key_value + 3 * arch.ffn)
    rows, length = work.sequences * work.rows, work.rows
    return {
        "layers": 6.0 * arch.layers * layer * rows,
        "head": 6.0 * arch.hidden * arch.vocab * work.sequences * work.response,
        "attention": 6.0 * arch.layers * query * length * rows,
    }


def trainer(arch: Architecture, config: Config, layout: Layout) -> Trainer:
    """A trainer that can update: random weights straight from an architecture, without files, prompts or engine."""
    objective = objectives.build(config.objective)
    policy = Policy(arch, config, layout, objective.log_z)
    learner = Learner(policy, config.optimizer, config.model.dtype == "bf16", total_updates=1)
    gate, budget = Fp8Gate(policy, config.model, length_norm=True), LogitsBudget(policy, config.model.logits_budget_mb)
    models = Models(policy, learner, None, None, None, None, gate, budget)
    parts: Any = {"engine": None, "queue": None, "grader": None}
    return Trainer(config, layout, objective, models, **parts)


def settings(precision: str, first_last_bf16: bool, megatron: dict[str, Any] | None = None) -> Config:
    model = {"path": "random", **PRECISIONS[precision]}
    if "fp8" in model and not first_last_bf16:
        model |= ALL_LAYERS
    tree = {
        "run_dir": "unused", "steps": 1, "model": model, "data": {"task": "sums"}, "megatron": megatron or {},
        "reward": "flowrl_mega.rewards.sums:score", "objective": {"name": "flowrl"},
    }  # fmt: skip
    return validated(Config, tree, "")


def recorded(arch: Architecture, work: Work, layout: Layout) -> list[MicroBatch]:
    """The update's micro-batches: random tokens, rewards and log-probs, always the same."""
    draw = torch.Generator().manual_seed(0)
    shape = (work.sequences, work.prompt + work.response)
    tokens = torch.randint(arch.vocab, shape, generator=draw).tolist()
    sequences = [Sequence(i, ids[: work.prompt], ids[work.prompt :]) for i, ids in enumerate(tokens)]
    (batches,) = plan(sequences, work.sequences, layout, work.tokens_per_microbatch)
    found = []
    for batch in batches:
        credit = torch.randn(batch.size, generator=draw, dtype=torch.float64)
        ref_logp, rollout_logp = (-8.0 + 0.1 * torch.randn(batch.target.numel(), generator=draw) for _ in range(2))
        device = batch.tokens.device
        logps = {"ref_logp": ref_logp.to(device), "rollout_logp": rollout_logp.to(device)}
        found.append(MicroBatch(batch, credit.to(device), group=batch.index, **logps))
    return found


def seconds_of_updates(job: Trainer, batches: list[MicroBatch], warm_up: int, rounds: int) -> list[float]:
    """Of each of `rounds` updates; forward, backward and optimizer are the trainer's own `update`."""

    def now() -> float:
        if job.layout.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    seconds = []
    for turn in range(warm_up + rounds):
        start = now()
        metrics = merge_updates([job.update(batches)])
        if turn >= warm_up:
            seconds.append(now() - start)
        if metrics["policy/skipped_updates"]:
            raise RuntimeError(f"an update was refused, so this is not a whole one: {metrics}")
    return seconds


def parameters(arch: Architecture) -> int:
    """Without norms and biases."""
    query, key_value = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    layer = arch.hidden * (2 * query + 2 * key_value + 3 * arch.ffn)
    return arch.layers * layer + (1 if arch.tied else 2) * arch.vocab * arch.hidden


def planned_bytes(arch: Architecture, work: Work) -> int:
    """What an update in bf16 needs at its peak on one GPU, without recomputation: at the end of a micro-batch's forward
    pass.

    A parameter: weight 2, fp32 gradient 4, fp32 copy 4, moments 8. A row and layer, of what the backward pass reads:
    input and output of both norms, q, k, v, the attention's output with one fp32 number a head, and what comes in and
    out of SwiGLU. A response row: its hidden state, its logits in fp32 and their gradient in bf16.
    """
    query, key_value = arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    count = max(1, min(work.sequences, work.tokens_per_microbatch // work.rows))
    row = 2 * (4 * arch.hidden + 2 * query + 2 * key_value + 3 * arch.ffn) + 4 * arch.heads
    head = count * work.response * (2 * arch.hidden + 6 * arch.vocab)
    return 18 * parameters(arch) + arch.layers * row * count * work.rows + head
