"""Packed micro-batches, the one layout of the whole trainer: sequences end to end, no padding (THD).

A sequence is prompt + response; its last token is never an input, since nothing is predicted from it.
Row t of a packed micro-batch predicts the token after it, so response rows start at the prompt's last token.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
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
    """One micro-batch of B sequences, T rows, R response tokens."""

    tokens: Tensor  # [T] int64 inputs
    position_ids: Tensor  # [T] int64, from 0 in every sequence
    cu_seqlens: Tensor  # [B + 1] int32 row offsets, those of a tail of padding (one more sequence) included
    lengths: Tensor  # int32 rows of each sequence; less than its offsets say where it is padded
    longest: int  # rows of the longest sequence, its padding included
    buckets: list[Bucket]
    index: Tensor  # [B] int64, each sequence's place in the step's batch
    response_rows: Tensor  # [R] int64, rows that predict a response token
    target: Tensor  # [R] int64, the response tokens
    response_cu_seqlens: Tensor  # [B + 1] int64 offsets into the response tokens
    response_offsets: list[int]  # the same on the host: to read a GPU's would wait for all that it has to do
    prompt_rows: Tensor  # [P] int64, rows of prompt tokens (log Z reads them)
    prompt_segment: Tensor  # [P] int64, the sequence of each prompt row
    prompt_lengths: Tensor  # [B] int64
    # Under context parallelism T, R and P above count what this rank has, `buckets` is empty, and further:
    rows: Tensor | None = None  # [T] int64, this rank's rows of the whole batch
    response_index: Tensor | None = None  # [R] int64, this rank's response tokens among all of the batch
    step: int = 0  # the training step, which seeds the random numbers of a forward

    @property
    def size(self) -> int:
        return self.prompt_lengths.numel()


def pack(
    sequences: list[Sequence], multiple: int = 1, device: torch.device | str = "cpu", each: int = 1
) -> PackedBatch:
    """One micro-batch of these sequences, longest first.

    `multiple`: T is padded up to it (sequence parallelism shards rows evenly) by one more, unread sequence. `each`:
    every sequence is padded up to it at its end (context parallelism shares out chunks of it); divides `multiple`.
    """
    ordered = sorted(sequences, key=lambda s: (-s.rows, s.index))
    inputs = [[*s.prompt, *s.response[:-1]] for s in ordered]
    tokens = [token for ids in inputs for token in (*ids, *[0] * (-len(ids) % each))]
    lengths = [s.rows for s in ordered]
    rows = [_up(n, each) for n in lengths]
    tail = -len(tokens) % multiple
    tokens, all_rows = tokens + [0] * tail, rows + [tail] * (tail > 0)
    starts = torch.tensor([0, *all_rows]).cumsum(0)
    prompt_lengths = torch.tensor([len(s.prompt) for s in ordered])
    response_lengths = torch.tensor([len(s.response) for s in ordered])
    response_cu_seqlens = torch.cat([torch.zeros(1, dtype=torch.long), response_lengths.cumsum(0)])
    sequence_starts = starts[: len(ordered)]
    batch = PackedBatch(
        tokens=torch.tensor(tokens),
        position_ids=_ranges(torch.zeros(len(all_rows), dtype=torch.long), torch.tensor(all_rows)),
        cu_seqlens=starts.to(torch.int32),
        lengths=torch.tensor(lengths + [tail] * (tail > 0), dtype=torch.int32),
        longest=max(all_rows),
        buckets=to_buckets(all_rows),
        index=torch.tensor([s.index for s in ordered]),
        response_rows=_ranges(sequence_starts + prompt_lengths - 1, response_lengths),
        target=torch.tensor([token for s in ordered for token in s.response]),
        response_cu_seqlens=response_cu_seqlens,
        response_offsets=response_cu_seqlens.tolist(),
        prompt_rows=_ranges(sequence_starts, prompt_lengths),
        prompt_segment=torch.repeat_interleave(prompt_lengths),
        prompt_lengths=prompt_lengths,
    )
    return _to(batch, device)


def _ranges(starts: Tensor, lengths: Tensor) -> Tensor:
    """start, start + 1, ... of each length, one after another."""
    offsets = lengths.cumsum(0) - lengths
    return torch.arange(int(lengths.sum())) + torch.repeat_interleave(starts - offsets, lengths)


def to_buckets(rows: list[int], fill: float = 0.8) -> list[Bucket]:
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


def split_data_parallel(sequences: list[Sequence], dp: int, least: int = 1) -> list[list[Sequence]]:
    """Sequences for each data-parallel rank, at least `least` each: the longest left always goes to whoever has the
    fewest rows, since all wait for the one with the most (Graham's LPT rule, within 4/3 of the best)."""
    assert len(sequences) >= dp * least, "every data-parallel rank needs a sequence"
    shares: list[list[Sequence]] = [[] for _ in range(dp)]
    rows = [0] * dp
    ordered = sorted(sequences, key=lambda s: (-s.rows, s.index))
    for left, sequence in zip(range(len(ordered), 0, -1), ordered, strict=True):
        short = [rank for rank in range(dp) if len(shares[rank]) < least]
        must = left <= sum(least - len(shares[rank]) for rank in short)
        rank = min(short if must else range(dp), key=rows.__getitem__)
        shares[rank].append(sequence)
        rows[rank] += sequence.rows
    return shares


def split_by_tokens(sequences: list[Sequence], budget: int, multiple: int = 1) -> list[list[Sequence]]:
    """Micro-batches of at most `budget` rows each (a longer sequence goes alone), in order of length.

    `multiple`: their number is made one of it by parting the largest (interleaved pipelines want that).
    """
    groups: list[list[Sequence]] = []
    used = budget + 1
    for sequence in sorted(sequences, key=lambda s: (-s.rows, s.index)):
        if used + sequence.rows > budget:
            groups.append([])
            used = 0
        groups[-1].append(sequence)
        used += sequence.rows
    while len(groups) % multiple:
        largest = max((g for g in groups if len(g) > 1), key=lambda g: sum(s.rows for s in g))
        groups.insert(groups.index(largest), largest[::2])
        del largest[::2]
    return groups


def _shared_out(
    sequences: list[Sequence], per_update: int, layout: Layout, tokens_per_microbatch: int
) -> Iterator[list[list[list[Sequence]]]]:
    """Of each update (mini-batch) of `per_update` sequences, in the order given, every data-parallel rank's
    micro-batches.

    The budget is a rank's: under context parallelism a micro-batch has cp times as many rows.
    """
    least = layout.pp if layout.vpp > 1 else 1  # micro-batches that an interleaved pipeline needs
    for start in range(0, len(sequences), per_update):
        shares = split_data_parallel(sequences[start : start + per_update], layout.dp, least)
        yield [split_by_tokens(share, tokens_per_microbatch * layout.cp, least) for share in shares]


def plan(
    sequences: list[Sequence], per_update: int, layout: Layout, tokens_per_microbatch: int
) -> list[list[PackedBatch]]:
    """This rank's micro-batches for each update."""
    updates = _shared_out(sequences, per_update, layout, tokens_per_microbatch)
    return [[_packed(group, layout) for group in ranks[layout.dp_rank]] for ranks in updates]


def _packed(sequences: list[Sequence], layout: Layout) -> PackedBatch:
    batch = pack(sequences, layout.row_multiple, each=layout.sequence_multiple)
    return _to(cp_shard(batch, layout.cp, layout.cp_rank) if layout.cp > 1 else batch, layout.device)


def efficiency(sequences: list[Sequence], per_update: int, layout: Layout, tokens_per_microbatch: int) -> float:
    """Rows of sequences / rows, padding included, that all replicas have time for while the one with the most computes
    its own."""
    computed = 0
    for ranks in _shared_out(sequences, per_update, layout, tokens_per_microbatch):
        computed += layout.dp * max(sum(_padded_rows(group, layout) for group in groups) for groups in ranks)
    return sum(s.rows for s in sequences) / computed


def _padded_rows(sequences: list[Sequence], layout: Layout) -> int:
    rows = sum(_up(s.rows, layout.sequence_multiple) for s in sequences)
    return _up(rows, layout.row_multiple)


def _up(number: int, multiple: int) -> int:
    return number + -number % multiple


def rank_rows(cu_seqlens: Tensor, cp: int, cp_rank: int) -> Tensor:
    """[T / cp] which rows of a packed batch a context-parallel rank has.

    A sequence is cut into 2 cp chunks (its length is a multiple of that), and rank r gets chunks r and 2 cp - 1 - r, as
    Transformer Engine's attention wants them: under a causal mask all ranks then work alike.
    """
    rows = []
    for start, end in zip(cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True):
        chunks = torch.arange(start, end).chunk(2 * cp)
        rows += [chunks[cp_rank], chunks[2 * cp - 1 - cp_rank]]
    return torch.cat(rows)


def cp_shard(batch: PackedBatch, cp: int, cp_rank: int) -> PackedBatch:
    """This context-parallel rank's rows of a batch. Offsets, lengths and the response tokens' order stay the batch's.

    Targets were shifted before, so they belong to rows wherever these go.
    """
    rows = rank_rows(batch.cu_seqlens, cp, cp_rank)
    own_row = torch.full((batch.tokens.numel(),), -1)  # of each of the batch's rows; -1: another rank's
    own_row[rows] = torch.arange(rows.numel())
    mine = (own_row[batch.response_rows] >= 0).nonzero()[:, 0]
    prompt = own_row[batch.prompt_rows] >= 0
    return replace(
        batch,
        tokens=batch.tokens[rows],
        position_ids=batch.position_ids[rows],
        buckets=[],
        rows=rows,
        response_rows=own_row[batch.response_rows[mine]],
        target=batch.target[mine],
        response_index=mine,
        prompt_rows=own_row[batch.prompt_rows[prompt]],
        prompt_segment=batch.prompt_segment[prompt],
    )
