"""Packed micro-batches, the one layout of the whole trainer: sequences end to end, no padding (THD).

A sequence is prompt + response; its last token is never an input, since nothing is predicted from it.
Row t of a packed micro-batch predicts the token after it, so response rows start at the prompt's last token.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from flowrl_mega.parallel.layout import Layout


@dataclass(frozen=True, slots=True)
class Sequence:
    """One prompt with one response, as token ids; `index` is its place in the step's batch."""

    index: int
    prompt: list[int]
    response: list[int]

    @property
    def rows(self) -> int:
        return len(self.prompt) + len(self.response) - 1


class Bucket(NamedTuple):
    """Neighbouring sequences of like length, attended in one padded view.

    `scatter` [t] gives each token's place in the padded [sequences * longest] view; None where all are equally long.
    """

    tokens: slice
    sequences: int
    longest: int
    scatter: Tensor | None


@dataclass
class PackedBatch:
    """One micro-batch of B sequences, T rows, R response tokens. The last three fields are filled by scoring."""

    tokens: Tensor  # [T] int64 inputs
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: Tensor  # [B + 1] int32 row offsets
    buckets: list[Bucket]
    index: Tensor  # [B] int64, each sequence's place in the step's batch
    response_rows: Tensor  # [R] int64, rows that predict a response token
    target: Tensor  # [R] int64, the response tokens
    response_cu_seqlens: Tensor  # [B + 1] int64 offsets into the response tokens
    prompt_rows: Tensor  # [P] int64, rows of prompt tokens (log Z reads them)
    prompt_segment: Tensor  # [P] int64, the sequence of each prompt row
    prompt_lengths: Tensor  # [B] int64
    scores: dict[str, Tensor] = field(default_factory=dict)  # old_logp, ref_logp, entropy: [R]; credit: [B]

    @property
    def size(self) -> int:
        return self.prompt_lengths.numel()


def pack(sequences: list[Sequence], multiple: int = 1, device: torch.device | str = "cpu") -> PackedBatch:
    """One micro-batch of these sequences, longest first.

    `multiple`: T is padded up to it (sequence parallelism shards rows evenly) by one more, unread sequence.
    """
    ordered = sorted(sequences, key=lambda s: (-s.rows, s.index))
    tokens = [token for s in ordered for token in (*s.prompt, *s.response[:-1])]
    rows = [s.rows for s in ordered]
    tail = -len(tokens) % multiple
    tokens, all_rows = tokens + [0] * tail, rows + [tail] * (tail > 0)
    starts = torch.tensor([0, *all_rows]).cumsum(0)
    prompt_lengths = torch.tensor([len(s.prompt) for s in ordered])
    response_lengths = torch.tensor([len(s.response) for s in ordered])
    sequence_starts = starts[: len(ordered)]
    batch = PackedBatch(
        tokens=torch.tensor(tokens),
        position_ids=_ranges(torch.zeros(len(all_rows), dtype=torch.long), torch.tensor(all_rows)),
        cu_seqlens=starts.to(torch.int32),
        buckets=_buckets(all_rows),
        index=torch.tensor([s.index for s in ordered]),
        response_rows=_ranges(sequence_starts + prompt_lengths - 1, response_lengths),
        target=torch.tensor([token for s in ordered for token in s.response]),
        response_cu_seqlens=torch.cat([torch.zeros(1, dtype=torch.long), response_lengths.cumsum(0)]),
        prompt_rows=_ranges(sequence_starts, prompt_lengths),
        prompt_segment=torch.repeat_interleave(prompt_lengths),
        prompt_lengths=prompt_lengths,
    )
    return _to(batch, device)


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each length, one after another."""
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - offsets, lengths)


def _buckets(rows: list[int], fill: float = 0.8) -> list[Bucket]:
    """Cut sequences, longest first, where one would fill less than `fill` of the padded view.

    The tail padding comes last and may be longer than the sequence before it: then it is a bucket of its own.
    """
    buckets, start, first = [], 0, 0
    while first < len(rows):
        longest, last = rows[first], first
        while last < len(rows) and fill * longest <= rows[last] <= longest:
            last += 1
        lengths = torch.tensor(rows[first:last])
        tokens = int(lengths.sum())
        uniform = tokens == longest * (last - first)
        scatter = None if uniform else _ranges(torch.arange(last - first) * longest, lengths)
        buckets.append(Bucket(slice(start, start + tokens), last - first, longest, scatter))
        start, first = start + tokens, last
    return buckets


def _to(batch: PackedBatch, device: torch.device | str) -> PackedBatch:
    if torch.device(device).type == "cpu":
        return batch
    for name, value in vars(batch).items():
        if isinstance(value, Tensor):
            setattr(batch, name, value.to(device, non_blocking=True))
    batch.buckets = [b._replace(scatter=None if b.scatter is None else b.scatter.to(device)) for b in batch.buckets]
    return batch


def split_data_parallel(sequences: list[Sequence], dp: int) -> list[list[Sequence]]:
    """Sequences for each data-parallel rank: like numbers, like lengths (dealt out longest first, back and forth)."""
    assert len(sequences) >= dp, "every data-parallel rank needs a sequence"
    shares: list[list[Sequence]] = [[] for _ in range(dp)]
    for place, sequence in enumerate(sorted(sequences, key=lambda s: (-s.rows, s.index))):
        turn, seat = divmod(place, dp)
        shares[seat if turn % 2 == 0 else dp - 1 - seat].append(sequence)
    return shares


def split_by_tokens(sequences: list[Sequence], budget: int) -> list[list[Sequence]]:
    """Micro-batches of at most `budget` rows each (a longer sequence goes alone), in order of length."""
    groups: list[list[Sequence]] = []
    used = budget + 1
    for sequence in sorted(sequences, key=lambda s: (-s.rows, s.index)):
        if used + sequence.rows > budget:
            groups.append([])
            used = 0
        groups[-1].append(sequence)
        used += sequence.rows
    return groups


def plan(
    sequences: list[Sequence], per_update: int, layout: Layout, tokens_per_microbatch: int
) -> list[list[PackedBatch]]:
    """This rank's micro-batches for each update (mini-batch) of `per_update` sequences, in the order given."""
    multiple = layout.tp if layout.sequence_parallel else 1
    updates = []
    for start in range(0, len(sequences), per_update):
        mine = split_data_parallel(sequences[start : start + per_update], layout.dp)[layout.dp_rank]
        groups = split_by_tokens(mine, tokens_per_microbatch)
        updates.append([pack(group, multiple, layout.device) for group in groups])
    return updates
