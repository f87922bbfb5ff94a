"""A vocabulary split over tensor-parallel ranks, in one process: statistics of each shard, then one combination."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from oracle import DTYPES, ENTROPY, IGNORED, LOGP, Case, Result, agrees, case, excess, oracle
from torch import Tensor

from flowrl_mega.ops.kernels import TORCH, Kernels

VOCAB, TAU = 301, 0.6


def split(c: Case, shards: int, size: int, padding: float) -> list[tuple[Tensor, int, int]]:
    """Each shard's logits, padded to `size` columns, its first id and how many of its columns count."""
    found = []
    for start in range(0, shards * size, size):
        mine = c.logits[:, start : start + size]
        fill = torch.full((len(mine), size - mine.shape[1]), padding, dtype=mine.dtype)
        found.append((torch.cat([mine, fill], 1), start, mine.shape[1]))
    return found


def over_shards(
    k: Kernels,
    c: Case,
    shards: list[tuple[Tensor, int, int]],
    change: Callable[[Tensor], Tensor] = lambda stats: stats,
) -> Result:
    """What the ranks would compute together; `change` is done to the statistics [W, 4, T] of all of them."""
    precision = torch.float64 if c.logits.dtype == torch.float64 else torch.float32
    tau, everything = torch.full((1,), 1 / TAU, dtype=precision), torch.tensor([0, len(c.target)])
    stats = [k.logprob_stats(x, c.target, tau, first, valid, IGNORED, True) for x, first, valid in shards]
    logp, entropy, maximum, log_sum, _ = k.segment_reduce(
        change(torch.stack(stats)), c.target, tau, everything, IGNORED
    )
    gradient = []
    for x, first, valid in shards:
        place = (c.target, c.grad, maximum, log_sum, tau, first, valid, IGNORED)
        k.logprob_backward_(x, *place)
        assert torch.equal(x[:, valid:], torch.zeros_like(x[:, valid:]))
        gradient.append(x[:, :valid])
    return Result(logp, entropy, torch.cat(gradient, 1))


SPLITS = {"1": (1, 301), "1-padded": (1, 320), "2": (2, 151), "2-one-is-padding": (2, 301)}
SPLITS |= {"4": (4, 76), "4-one-is-padding": (4, 120), "8": (8, 38), "8-three-are-padding": (8, 64)}
PADDINGS = [pytest.param(*SPLITS[name], torch.nan, id=name) for name in SPLITS]
PADDINGS += [pytest.param(4, 120, padding, id=f"4-one-is-padding-of-{padding}") for padding in (torch.inf, 1e4)]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("shards", "size", "padding"), PADDINGS)
def test_any_split_gives_the_whole(shards, size, padding, dtype, kernels):
    """Down to shards of nothing but padding, whose maximum of -inf must weigh exactly nothing."""
    parts = [case(4, VOCAB, DTYPES[dtype], scale, seed) for seed, scale in enumerate((0.02, 3.0, 30.0))]
    c = Case(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    c.target[5] = IGNORED
    agrees(over_shards(kernels, c, split(c, shards, size, padding)), oracle(*c[:2], TAU, c.grad))


def test_odd_rows_over_shards(kernels):
    """NaN or infinity on one shard is NaN for the whole row, also beside shards that hold only masked logits."""
    c = case(8, VOCAB)
    c.logits[0, 100] = c.logits[1, 300] = torch.nan
    c.logits[2, 0] = torch.inf
    c.logits[3, 76:152] = -torch.inf  # a whole shard
    c.logits[4, 76:] = -torch.inf  # all but one
    c.logits[5, :76] = -torch.inf
    c.logits[5, 10] = torch.nan  # in a shard without any other number
    c.logits[6] = -torch.inf
    c.target[4] = 200  # masked itself
    found, wanted = over_shards(kernels, c, split(c, 4, 76, 0.0)), oracle(*c[:2], TAU, c.grad)
    rest = torch.tensor([3, 4, 7])
    agrees(Result(*(x[rest] for x in found)), Result(*(x[rest] for x in wanted)))
    assert found.logp[[0, 1, 2, 5, 6]].isnan().all() and found.entropy[[0, 1, 2, 5, 6]].isnan().all()


def test_shard_statistics_say_what_the_schema_does(kernels):
    """What every implementation hands to the collective, where one must understand the other."""
    c = case(3, 40)
    c.target[:] = torch.tensor([7, IGNORED, 30])
    tau = torch.full((1,), 1 / TAU)
    stats = kernels.logprob_stats(c.logits, c.target, tau, 20, 40, IGNORED, True)
    d = (c.logits.double() - c.logits.double().amax(1, keepdim=True)) / TAU
    wanted = torch.stack([c.logits.double().amax(1), d.exp().sum(1), (d * d.exp()).sum(1), c.logits.double()[:, 10]])
    wanted[3, 0], wanted[:, 1] = 0.0, torch.tensor([-torch.inf, 0.0, 0.0, 0.0])  # not its own; ignored
    assert excess(stats, wanted, (1e-6, 0.0)) <= 1
    assert torch.equal(kernels.logprob_stats(c.logits, c.target, tau, 20, 40, IGNORED, False)[2], torch.zeros(3))
    void = kernels.logprob_stats(c.logits, c.target, tau, 20, 0, IGNORED, True)
    assert torch.equal(void, torch.tensor([-torch.inf, 0.0, 0.0, 0.0])[:, None].expand(4, 3))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_native_and_torch_shards_mix(dtype, kernels):
    """One rank without a compiler falls back to torch: its statistics must mean the same."""
    c = case(12, VOCAB, dtype)
    first, second = split(c, 2, 160, torch.nan)
    tau = torch.full((1,), 1 / TAU, dtype=c.grad.dtype)
    stats = [
        k.logprob_stats(x, c.target, tau, start, valid, IGNORED, True)
        for k, (x, start, valid) in ((kernels, first), (TORCH, second))
    ]
    wanted = oracle(*c[:2], TAU)
    for k in (kernels, TORCH):
        logp, entropy, *_ = k.segment_reduce(torch.stack(stats), c.target, tau, torch.tensor([0, 12]), IGNORED)
        assert excess(logp, wanted.logp, LOGP) <= 1 and excess(entropy, wanted.entropy, ENTROPY) <= 1


def test_chunks_count_as_shards(kernels):
    """The lm-head hands on those of all ranks; one without any number must stay one that weighs nothing."""
    c = case(6, VOCAB)
    c.logits[1, :152] = -torch.inf  # the first shard
    c.logits[2, :76] = c.logits[5, :76] = -torch.inf
    c.logits[5, 10] = torch.nan
    c.target[3] = IGNORED
    tau, wanted = torch.full((1,), 1 / TAU), oracle(*c[:2], TAU)
    chunks = [
        kernels.logprob_stats(x, c.target, tau, first, valid, IGNORED, True)
        for x, first, valid in split(c, 5, 76, torch.nan)
    ]
    assert torch.equal(chunks[0][:3, 1], torch.tensor([-torch.inf, 0.0, 0.0]))
    logp, entropy, *_ = kernels.segment_reduce(torch.stack(chunks), c.target, tau, torch.tensor([0, 6]), IGNORED)
    assert wanted.logp[5].isnan()
    assert excess(logp, wanted.logp, LOGP) <= 1 and excess(entropy, wanted.entropy, ENTROPY) <= 1


def _without_rescale(stats: Tensor) -> Tensor:
    """S and E of the shards simply added up, each against its own maximum."""
    wrong = stats.clone()
    wrong[:, 0] = stats[:, 0].amax(0)
    return wrong


def _without_shift(stats: Tensor) -> Tensor:
    """S rescaled, E with the factor but not its shift."""
    shift = (stats[:, 0] - stats[:, 0].amax(0)) / TAU
    wrong = stats.clone()
    wrong[:, 2] -= shift * stats[:, 1]
    return wrong


def _without_the_last(stats: Tensor) -> Tensor:
    return stats[:-1].contiguous()


@pytest.mark.parametrize("mistake", [_without_rescale, _without_shift, _without_the_last])
def test_a_wrong_combination_would_be_seen(mistake):
    """The bounds have teeth."""
    c = case(12, VOCAB)
    found = over_shards(TORCH, c, split(c, 4, 76, 0.0), mistake)
    wanted = oracle(*c[:2], TAU, c.grad)
    assert max(excess(found.logp, wanted.logp, LOGP), excess(found.entropy, wanted.entropy, ENTROPY)) > 1000


def test_counted_padding_would_be_seen():
    """Three columns of 0 too many, as a weight's rows of 0 give them."""
    c = case(12, VOCAB, scale=0.5)
    shards = [(x, start, x.shape[1]) for x, start, _ in split(c, 4, 76, 0.0)]
    padded = over_shards(TORCH, c, shards)
    assert excess(padded.logp, oracle(*c[:2], TAU).logp, LOGP) > 1000
