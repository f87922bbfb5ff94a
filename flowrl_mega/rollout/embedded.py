"""The embedded engine: generates with the policy's own weights, in the trainer's own processes.

Training may be tensor-parallel; generation is always data-parallel: every rank gathers the whole weights and generates
for its part of the prompts. At tp = 2 the decode step of a small model is dominated by the latency of all-reduces, and
two whole copies are 2-3x faster. Models too large for that need an engine behind a server.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor

from flowrl_mega.model.generation import Decoder, Generated, Sampling, generate
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.weights import WholeWeights
from flowrl_mega.parallel.cuda_is_cpu import paused
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rollout.engine import AnswerCallback, Request, Rollout


@dataclass(frozen=True)
class _Job:
    requests: list[Request]
    sampling: Sampling
    seed: int
    on_answer: AnswerCallback | None


class EmbeddedEngine:
    """`Engine` on a batched decoder with a key-value cache; `sequences_at_once` bounds its memory.

    A job's work is done by `finish`. All its requests have the same `answers` and `max_tokens`.
    """

    def __init__(self, layout: Layout, sequences_at_once: int = 512) -> None:
        self.layout, self.sequences_at_once = layout, sequences_at_once
        self.weights: WholeWeights | None = None
        self.decoder: Decoder | None = None
        self.version = -1

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        if self.weights is None or self.weights.policy is not policy:
            self.weights = WholeWeights(policy)
        self.decoder = Decoder(policy.arch, self.weights.gather())
        self.version = version
        return {}

    def start(
        self, requests: list[Request], sampling: Sampling, seed: int, on_answer: AnswerCallback | None = None
    ) -> _Job:
        assert len({(request.answers, request.max_tokens) for request in requests}) == 1, "equal requests"
        return _Job(requests, replace(sampling, max_tokens=requests[0].max_tokens), seed, on_answer)

    def finish(self, job: _Job) -> list[list[Rollout]]:
        assert self.decoder is not None, "sync() comes first"
        prompts, answers, sampling = [r.prompt for r in job.requests], job.requests[0].answers, job.sampling
        noise = uniform(len(prompts) * answers, sampling.max_tokens, job.seed).view(len(prompts), answers, -1)
        mine = range(self.layout.rank, len(prompts), self.layout.world)
        at_once = max(1, self.sequences_at_once // answers)
        done: dict[int, list[Rollout]] = {}
        with paused():
            for start in range(0, len(mine), at_once):
                indices = list(mine[start : start + at_once])
                rows = noise[indices].flatten(0, 1).to(self.layout.device)
                on_rows = partial(self._report, job.on_answer, indices, answers) if job.on_answer else None
                generated = generate(self.decoder, [prompts[i] for i in indices], answers, sampling, rows, on_rows)
                rollouts = self._rollouts(generated, list(range(len(indices) * answers)))
                done.update((index, rollouts[i * answers : (i + 1) * answers]) for i, index in enumerate(indices))
        everyone: dict[int, list[Rollout]] = {}
        for part in self.layout.gather_objects(done):
            everyone.update(part)
        return [everyone[index] for index in range(len(prompts))]

    def release(self) -> None:
        """Nothing to free: at tp = 1 the weights are the policy's own, and the cache is freed after each batch."""

    def metrics(self) -> dict[str, float]:
        return {}

    def close(self) -> None:
        self.weights = self.decoder = None

    def _report(
        self, on_answer: AnswerCallback, indices: list[int], answers: int, generated: Generated, rows: list[int]
    ) -> None:
        """Call `on_answer` for the answers in these rows, of which there are `answers` per request."""
        for row, rollout in zip(rows, self._rollouts(generated, rows), strict=True):
            on_answer(indices[row // answers], row % answers, rollout)

    def _rollouts(self, generated: Generated, rows: list[int]) -> list[Rollout]:
        """The answers in these rows of `generated`."""
        tokens, logp = generated.tokens[rows].tolist(), generated.logp[rows].tolist()
        ends = zip(generated.lengths[rows].tolist(), generated.stopped[rows].tolist(), strict=True)
        return [
            Rollout(tokens[i][:n], logp[i][:n], "stop" if stopped else "length", [(self.version, n)])
            for i, (n, stopped) in enumerate(ends)
        ]


def uniform(rows: int, columns: int, seed: int) -> Tensor:
    """[rows, columns] numbers in [0, 1) that depend only on the seed."""
    return torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed))
