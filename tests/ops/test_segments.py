"""segment_reduce: sums over sequences of any shape, in an order that packing cannot change."""

from __future__ import annotations

import math

import pytest
import torch
from oracle import IGNORED, LOGP, case, excess, oracle, same_bits
from torch import Tensor

from flowrl_mega.ops import LogProb, logprob

SKEWS = {
    "uniform": [64] * 32,
    "one long, many short": [32768] + [16] * 256,
    "many short, one long": [16] * 256 + [32768],
    "all empty but one": [0] * 40 + [500] + [0] * 40,
    "empty between": [3, 0, 5, 0, 0, 1],
    "one row each": [1] * 100,
    "one sequence": [777],
}


def offsets(lengths: list[int]) -> Tensor:
    return torch.tensor([0, *lengths]).cumsum(0)


@pytest.mark.parametrize("lengths", SKEWS.values(), ids=SKEWS)
def test_sums_are_those_of_the_rows(lengths, backend):
    """Whatever the skew, in float64: log w is a difference of two such sums."""
    c = case(sum(lengths), 8)
    c.target[::7] = IGNORED
    cu_seqlens = offsets(lengths)
    out = logprob(c.logits, c.target, cu_seqlens, backend=backend)
    wanted = oracle(c.logits, c.target)
    assert excess(out.logp, wanted.logp, LOGP) <= 1
    assert out.sequence.dtype == torch.float64 and out.sequence.shape == (len(lengths), 3)
    for found, first, last in zip(
        out.sequence.tolist(), cu_seqlens[:-1].tolist(), cu_seqlens[1:].tolist(), strict=True
    ):
        rows = slice(first, last)
        read = int((c.target[rows] != IGNORED).sum())
        exact = [math.fsum(out.logp[rows].tolist()), read, math.fsum(out.entropy[rows].tolist())]
        assert found == pytest.approx(exact, rel=1e-12, abs=1e-12)
        assert last > first or found == [0.0, 0.0, 0.0]


def by_sequence(out: LogProb, lengths: list[int], order: list[int]) -> list[tuple[Tensor, ...]]:
    """logp, entropy and sums of each sequence, in the original order."""
    rows = zip(out.logp.split(lengths), out.entropy.split(lengths), out.sequence, strict=True)
    return [part for _, part in sorted(zip(order, rows, strict=True), key=lambda x: x[0])]


@pytest.mark.parametrize("columns", [37, 3001])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packing_order_does_not_change_a_sequence(columns, dtype, backend):
    """To the bit: otherwise the same rollout would have another weight w in another micro-batch."""
    lengths = [1, 40, 7, 0, 16, 3]
    c = case(sum(lengths), columns, dtype)
    parts = list(zip(c.logits.split(lengths), c.target.split(lengths), strict=True))
    found = []
    for order in ([0, 1, 2, 3, 4, 5], [5, 4, 3, 2, 1, 0], [3, 1, 5, 0, 4, 2]):
        logits, target = (torch.cat(tensors) for tensors in zip(*(parts[i] for i in order), strict=True))
        packed = [lengths[i] for i in order]
        out = logprob(logits, target, offsets(packed), temperature=0.6, backend=backend)
        found.append(by_sequence(out, packed, order))
    for other in found[1:]:
        for a, b in zip(found[0], other, strict=True):
            assert all(same_bits(x.contiguous(), y.contiguous()) for x, y in zip(a, b, strict=True))


def test_a_sequence_alone_is_the_same(backend):
    """Also when nothing else is packed beside it."""
    c = case(40, 301)
    whole = logprob(c.logits, c.target, offsets([11, 20, 9]), backend=backend)
    alone = logprob(c.logits[11:31], c.target[11:31], backend=backend)
    assert same_bits(whole.logp[11:31], alone.logp) and same_bits(whole.sequence[1], alone.sequence[0])


def test_offsets_out_of_range_do_not_read_out_of_bounds(kernels):
    """On CUDA their values are checked too late to stop the kernel, so it has to clamp them."""
    stats = torch.zeros(1, 4, 5) + torch.tensor([0.0, 1.0, 0.0, -1.0])[:, None]
    target, ones = torch.zeros(5, dtype=torch.long), torch.ones(1)
    *_, sums = kernels.segment_reduce(stats, target, ones, torch.tensor([-(2**40), 2, 2**40]), IGNORED)
    assert sums.isfinite().all() and sums[:, 1].sum() <= 5


def test_sums_in_float32_would_be_seen():
    """The bound on the sums has teeth: row after row in float32 it is a tenth of a nat off or more."""
    values = oracle(*case(32768, 8)[:2]).logp.float()
    exact, running = math.fsum(values.tolist()), values.numpy().cumsum()[-1].item()
    assert abs(running - exact) > 0.1
