"""The embedded engine: answers from the policy's own weights, in the trainer's own processes.

Training may be tensor-parallel; generation is always data-parallel: every rank gathers the whole weights and takes its
share of the prompts. At tp = 2 a small model's decode step is all latency of all-reduces, and two whole copies are
2-3x faster. A model too large for that is what an engine behind a server is for.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_mega.model.generation import Decoder, Generated, Sampling, generate
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.weights import WholeWeights
from flowrl_mega.parallel.cuda_is_cpu import paused
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rollout.engine import Rollout


class EmbeddedEngine:
    """`Engine` on a batched key-value-cache decoder; `sequences_at_once` bounds its memory."""

    def __init__(self, layout: Layout, sequences_at_once: int = 512) -> None:
        self.layout, self.sequences_at_once = layout, sequences_at_once
        self.weights: WholeWeights | None = None
        self.decoder: Decoder | None = None
        self.version = -1

    def sync(self, policy: Policy, version: int) -> None:
        if self.weights is None or self.weights.policy is not policy:
            self.weights = WholeWeights(policy)
        self.decoder = Decoder(policy.arch, self.weights.gather())
        self.version = version

    def generate(self, prompts: list[list[int]], answers: int, sampling: Sampling, seed: int) -> list[Rollout]:
        assert self.decoder is not None, "sync() comes first"
        noise = uniform(len(prompts) * answers, sampling.max_tokens, seed).view(len(prompts), answers, -1)
        mine = range(self.layout.rank, len(prompts), self.layout.world)
        at_once = max(1, self.sequences_at_once // answers)
        done: dict[int, list[Rollout]] = {}
        with paused():
            for start in range(0, len(mine), at_once):
                places = list(mine[start : start + at_once])
                rows = noise[places].flatten(0, 1).to(self.layout.device)
                generated = generate(self.decoder, [prompts[i] for i in places], answers, sampling, rows)
                done.update(zip(places, self._rollouts(generated, answers), strict=True))
        everyone: dict[int, list[Rollout]] = {}
        for part in self.layout.gather_objects(done):
            everyone.update(part)
        return [rollout for place in range(len(prompts)) for rollout in everyone[place]]

    def _rollouts(self, generated: Generated, answers: int) -> list[list[Rollout]]:
        tokens, logp = generated.tokens.tolist(), generated.logp.tolist()
        ends = zip(generated.lengths.tolist(), generated.stopped.tolist(), strict=True)
        rollouts = [
            Rollout(tokens[i][:n], logp[i][:n], "stop" if stopped else "length", self.version)
            for i, (n, stopped) in enumerate(ends)
        ]
        return [rollouts[i : i + answers] for i in range(0, len(rollouts), answers)]


def uniform(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] numbers in [0, 1) that depend on the seed alone."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
