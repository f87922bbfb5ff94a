"""Is it Z or w? Gradient norms of FlowRL's loss by the length of answers, where the policy has drifted from pi_old.

    python tools/benchmarks/gradient_norms.py [--drift 0 0.001 0.0041 0.0048] [--lengths 512 2048 8192] [--json FILE]

GFlowRL's paper blames the learned log Z for FlowRL's exploding gradients (norms of 1e6 and more, 9.6e16 at most); the
first release of FlowRL left its weight w unclipped. Here every token's log-ratio to pi_old has the mean --drift and the
spread 0.05, in nats; pi_old has the same distance from pi_ref at every length. The gradient is that of the objective's
own loss, with the paper's beta and r_hat, over the logits of a table of bigrams from which 8 answers were drawn, half
of them right. z mlp is a log Z that is 1 off, z random is drawn from N(0.5, 1), z group is the group's own. A norm is
the median over 5 draws; nothing is clipped.
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from workload import machine, write

WEIGHTS, ZS = ("released", "max10", "paper"), ("mlp", "random", "group")
VOCAB, ANSWERS, SPREAD, OF_REFERENCE, DRAWS = 64, 8, 0.05, 0.02, 5


def main() -> None:
    options = parser().parse_args()
    rows = []
    for drift in options.drift:
        for length in options.lengths:
            norms = {(w, z): [norm(length, drift, w, z, seed) for seed in range(DRAWS)] for w in WEIGHTS for z in ZS}
            row: dict[str, Any] = {"drift": drift, "length": length}
            row |= {f"{w}, {z}": statistics.median(values) for (w, z), values in norms.items()}
            print("  ".join(f"{name} {value:.3g}" for name, value in row.items()), flush=True)
            rows.append(row)
    write(options.json, machine("torch"), rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Gradient norms by length, weight and log Z, under drift.")
    parser.add_argument("--drift", type=float, nargs="+", default=[0.0, 0.001, 0.0041, 0.0048], help="nats a token")
    parser.add_argument("--lengths", type=int, nargs="+", default=[512, 2048, 8192], help="tokens")
    parser.add_argument("--json")
    return parser


def norm(length: int, drift: float, weight: str, z: str, seed: int) -> float:
    """Of the gradient of the mean loss over the bigrams' logits."""
    from flowrl_mega.objectives import FlowRL, LossInputs

    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(VOCAB, VOCAB, generator=generator, dtype=torch.float64).requires_grad_()
    tokens = draw(logits.detach(), length, generator)
    logp = logits.log_softmax(-1)[tokens[:, :-1], tokens[:, 1:]].reshape(-1)

    def noise(spread: float) -> Tensor:
        return spread * torch.randn(logp.shape, generator=generator, dtype=torch.float64)

    old = logp.detach() - drift - noise(SPREAD)
    objective = FlowRL(weight=weight, z=z)
    group = torch.zeros(ANSWERS, dtype=torch.long)
    rewards = torch.tensor([1.0, 0.0] * (ANSWERS // 2), dtype=torch.float64)
    bounds = torch.arange(0, ANSWERS * length + 1, length)
    log_z = torch.ones(ANSWERS, dtype=torch.float64) if z == "mlp" else None
    credit = objective.credit(rewards, group)
    s = LossInputs(logp, old, old - noise(OF_REFERENCE), log_z, bounds, credit, group=group, groups=1)
    (given,) = objective.prepare([s], lambda x: x, 1)
    loss = objective.loss(replace(s, prepared=given))
    (gradient,) = torch.autograd.grad(loss.loss_sum / ANSWERS, logits)
    return float(gradient.norm())


def draw(logits: Tensor, length: int, generator: torch.Generator) -> Tensor:
    """Answers of so many tokens after a first one, [ANSWERS, 1 + length]."""
    p = logits.softmax(-1)
    tokens = [torch.zeros(ANSWERS, dtype=torch.long)]
    for _ in range(length):
        tokens.append(torch.multinomial(p[tokens[-1]], 1, generator=generator)[:, 0])
    return torch.stack(tokens, 1)


if __name__ == "__main__":
    main()
