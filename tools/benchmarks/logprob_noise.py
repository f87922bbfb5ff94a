"""How far rounding throws off the sum over an answer of d = logp_new - logp_old, the number that objectives work with.

An answer of `--tokens` tokens (8192): hidden states in bf16, an old and a slightly different new weight in bf16, tokens
drawn from the old policy. The exact sum is computed in float64 from these very numbers. Logits are then rounded to bf16
as a bf16 GEMM does, or kept in fp32; and once the op of this repository is asked.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
from logprob_logits import statistics
from torch import Tensor

from flowrl_mega.ops import lm_head_logprob
from flowrl_mega.ops.build import BuildError
from flowrl_mega.ops.kernels import kernels_for

CHANGE = 0.02  # of the weight between old and new policy, relative: a little above the step of bf16
LOGIT_SCALE = 6.0  # standard deviation of the logits: the drawn ones are then 10 to 30, as a trained model's are
TRIALS = 8
CHUNK_ROWS = 1024


def measure(options: argparse.Namespace) -> list[dict[str, Any]]:
    """The root mean square over TRIALS answers of the error of sum d, for each way to get there."""
    tokens, vocab, hidden_size = options.tokens or 8192, options.vocab or 8192, options.hidden or 576
    generator = torch.Generator(options.device).manual_seed(0)
    ways: dict[str, Callable[..., Tensor]] = {"bf16": bf16_logits, "fp32": fp32_logits}
    try:
        kernels_for("native", torch.device(options.device))
        ways["native"] = native
    except BuildError as error:
        print(f"native: not run: {error}")
    errors: dict[str, list[float]] = {name: [] for name in ways}
    sums = []
    for _ in range(TRIALS):
        hidden, old, new, target = answer(tokens, vocab, hidden_size, options.device, generator)
        exact = sum_of_d(in_float64, hidden, old, new, target)
        sums.append(exact)
        for name, way in ways.items():
            errors[name].append(sum_of_d(way, hidden, old, new, target) - exact)
    shape = {"mode": "noise", "tokens": tokens, "hidden": hidden_size, "vocab": vocab, "answers": TRIALS}
    rows = [{"logits": name, **shape, "rms_error_of_sum_d": rms(values)} for name, values in errors.items()]
    print(f"sum of d over {tokens} tokens, {TRIALS} answers, vocabulary {vocab}: rms {rms(sums):.4g}")
    for row in rows:
        row["rms_sum_d"] = rms(sums)
        print(f"{row['logits']:<8} logits: rms error {row['rms_error_of_sum_d']:.3g}")
    return rows


def answer(
    tokens: int, vocab: int, hidden_size: int, device: str, generator: torch.Generator
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def random(rows: int) -> Tensor:
        return torch.randn(rows, hidden_size, generator=generator, device=device)

    hidden = random(tokens).bfloat16()
    master = random(vocab) * LOGIT_SCALE / hidden_size**0.5
    old, new = master.bfloat16(), (master * (1 + CHANGE * random(vocab))).bfloat16()
    target = [torch.multinomial((rows.float() @ old.float().t()).softmax(-1), 1, generator=generator)[:, 0]
              for rows in hidden.split(CHUNK_ROWS)]  # fmt: skip
    return hidden, old, new, torch.cat(target)


def sum_of_d(way: Callable[..., Tensor], hidden: Tensor, old: Tensor, new: Tensor, target: Tensor) -> float:
    """In float64: what is left is the error of the log-probs themselves."""
    parts = zip(hidden.split(CHUNK_ROWS), target.split(CHUNK_ROWS), strict=True)
    return sum((way(h, new, t).double() - way(h, old, t).double()).sum().item() for h, t in parts)


def in_float64(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return torch.log_softmax(hidden.double() @ weight.double().t(), -1).gather(1, target[:, None])[:, 0]


def bf16_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return statistics(hidden @ weight.t(), target)[0]


def fp32_logits(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    return statistics(hidden.float() @ weight.float().t(), target)[0]


def native(hidden: Tensor, weight: Tensor, target: Tensor) -> Tensor:
    """What the trainer calls: bf16 weights, chunk GEMMs with fp32 logits."""
    with torch.no_grad():
        return lm_head_logprob(hidden, weight, target, backend="native").logp


def rms(values: list[float]) -> float:
    return (sum(value**2 for value in values) / len(values)) ** 0.5
