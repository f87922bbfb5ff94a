"""Seeds for the answers of a job, and the way of its answers from the rank that has them to all others."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.rollout.engine import Request, Rollout

REASONS: tuple[Literal["stop", "length"], ...] = ("stop", "length")


def answer_seeds(requests: list[Request], seed: int) -> list[list[int]]:
    """A seed of 31 bits per answer, one list per request."""
    count = sum(request.answers for request in requests)
    drawn = iter((np.random.SeedSequence(seed).generate_state(count) >> 1).tolist())
    return [[next(drawn) for _ in range(request.answers)] for request in requests]


def broadcast_answers(
    answers: list[list[Rollout]] | None, requests: list[Request], is_source: bool
) -> list[list[Rollout]]:
    """Rank 0's answers (`is_source`; elsewhere None) on all ranks, one list per request. Collective.

    They travel as flat arrays, since pickled lists of a large step would take minutes. Log-probs are rounded to
    float32, on every rank alike.
    """
    rollouts = [rollout for group in answers or [] for rollout in group]
    count = sum(request.answers for request in requests)

    def broadcast(rows: Iterable[object], dtype: torch.dtype, *shape: int) -> Tensor:
        return _from_rank0(torch.tensor(list(rows), dtype=dtype).view(shape) if is_source else None, dtype, shape)

    sizes = ((len(r.response), len(r.versions), REASONS.index(r.finish_reason)) for r in rollouts)
    lengths, spans, reasons = broadcast(sizes, torch.int32, count, 3).T.tolist() if count else ([], [], [])
    token_ids = broadcast((token for r in rollouts for token in r.response), torch.int32, sum(lengths))
    logp = broadcast((value for r in rollouts for value in r.logp), torch.float32, sum(lengths))
    versions = broadcast((span for r in rollouts for span in r.versions), torch.int32, sum(spans), 2)
    columns = (token_ids.split(lengths), logp.split(lengths), reasons, versions.split(spans))
    received = iter(
        Rollout(ids.tolist(), values.tolist(), REASONS[reason], [(version, n) for version, n in made_by.tolist()])
        for ids, values, reason, made_by in zip(*columns, strict=True)
    )
    return [[next(received) for _ in range(request.answers)] for request in requests]


def _from_rank0(tensor: Tensor | None, dtype: torch.dtype, shape: tuple[int, ...]) -> Tensor:
    """Rank 0's tensor on every rank; None elsewhere."""
    tensor = torch.empty(shape, dtype=dtype) if tensor is None else tensor
    if dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast(tensor, src=0)
    return tensor
