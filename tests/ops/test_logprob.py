"""The lm-head log-prob against log_softmax in float64: values, entropy, gradients, memory paths, vocabulary shards."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.ops import logprob
from flowrl_mega.ops.logprob import Shard, lm_head_logprob
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.cuda_is_cpu import paused

ROWS, HIDDEN, VOCAB = 37, 16, 53
TOLERANCE = 2e-6


class Case(NamedTuple):
    hidden: Tensor  # [R, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [R]
    grad: Tensor  # [R], of the loss with respect to each log-prob


class Result(NamedTuple):
    logp: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def case(scale: float = 3.0, seed: int = 0) -> Case:
    """Logits of a standard deviation of `scale`: neither flat nor one-hot."""
    g = torch.Generator().manual_seed(seed)
    hidden, weight = torch.randn(ROWS, HIDDEN, generator=g), torch.randn(VOCAB, HIDDEN, generator=g)
    target = torch.randint(VOCAB, (ROWS,), generator=g)
    return Case(hidden, weight * scale / HIDDEN**0.5, target, torch.randn(ROWS, generator=g))


def oracle(c: Case, temperature: float) -> Result:
    hidden, weight = c.hidden.double().requires_grad_(), c.weight.double().requires_grad_()
    logp = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    entropy = -(logp.exp() * logp).sum(-1)
    picked = logp.gather(1, c.target[:, None])[:, 0]
    picked.backward(c.grad.double())
    return Result(picked.detach(), entropy.detach(), hidden.grad, weight.grad)


def ours(c: Case, temperature: float = 1.0, **options) -> Result:
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    out = lm_head_logprob(hidden, weight, c.target, temperature=temperature, **options)
    out.logp.backward(c.grad)
    assert not out.entropy.requires_grad
    return Result(out.logp.detach(), out.entropy, hidden.grad, weight.grad)


def error(found: Result, wanted: Result) -> float:
    """The largest error of any of the four, in units of its largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def same_bits(a: Result, b: Result) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("temperature", [0.6, 1.0, 2.0])
@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_equals_log_softmax_in_float64(temperature, scale):
    found = error(ours(case(scale), temperature), oracle(case(scale), temperature))
    assert found < TOLERANCE


def test_large_logits_stay_finite():
    """exp() of a raw logit of 300 is infinite in float32: the maximum must come off first."""
    c = case(100.0)
    assert error(ours(c, 0.6), oracle(c, 0.6)) < 10 * TOLERANCE


@pytest.mark.parametrize("budget", [0, 4 * VOCAB * 12])
def test_recomputed_logits_give_the_same_bits_as_kept_ones(budget, monkeypatch):
    """The budget is a matter of memory alone; with 12 rows' worth, some chunks are kept and others recomputed."""
    monkeypatch.setattr(logprob, "_CHUNK_BYTES", 4 * VOCAB * 5)
    made = []
    real = logprob._logits
    monkeypatch.setattr(logprob, "_logits", lambda *args: made.append(1) or real(*args))
    kept = ours(case(), 0.6)
    chunks = len(made)
    recomputed = ours(case(), 0.6, logits_budget_bytes=budget)
    assert chunks == 8
    assert len(made) - chunks == 2 * chunks - budget // (4 * VOCAB * 5), "the backward pass made the rest again"
    assert same_bits(kept, recomputed)


@pytest.mark.parametrize("rows", [1, 5, 36, 37])
def test_chunks_do_not_change_the_result(rows, monkeypatch):
    """Also where the last chunk is shorter, and where a chunk is a single row."""
    whole = oracle(case(), 0.6)
    monkeypatch.setattr(logprob, "_CHUNK_BYTES", 4 * VOCAB * rows)
    assert error(ours(case(), 0.6), whole) < TOLERANCE


def test_padded_rows_of_the_weight_are_never_read():
    """A padded column counted in the softmax is a known mistake: here it would be NaN."""
    c = case()
    garbage = torch.full((11, HIDDEN), torch.nan)
    padded = c._replace(weight=torch.cat([c.weight, garbage]))
    found = ours(padded, shard=Shard(0, VOCAB))
    assert torch.equal(found.d_weight[VOCAB:], torch.zeros(11, HIDDEN))
    assert same_bits(found._replace(d_weight=found.d_weight[:VOCAB]), ours(c))


def on_shards(c: Case, temperature: float, shard_rows: int, fill: float) -> Result:
    """This rank's result for a vocabulary padded to `shard_rows` a rank, the padding filled with `fill`."""
    layouts.init(layouts.ParallelSettings(), seed=0)
    rank, world = dist.get_rank(), dist.get_world_size()
    padding = torch.full((shard_rows * world - VOCAB, HIDDEN), fill)
    start = rank * shard_rows
    weight = torch.cat([c.weight, padding])[start : start + shard_rows]
    shard = Shard(start, max(0, min(shard_rows, VOCAB - start)))
    with paused():
        return ours(c._replace(weight=weight), temperature, shard=shard, group=dist.group.WORLD)


@pytest.mark.ranks
@pytest.mark.parametrize("fill", [torch.nan, 1e4], ids=["nan", "huge"])
@pytest.mark.parametrize("shard_rows", [27, 40, 53, 60], ids=["tight", "padded", "all-on-one", "one-is-padding"])
def test_two_ranks_share_the_vocabulary(shard_rows, fill, ranks2):
    """Real gloo ranks, down to a rank that holds nothing but padding."""
    wanted = oracle(case(), 0.6)
    first, second = ranks2.run(on_shards, case(), 0.6, shard_rows, fill)
    for field in ("logp", "entropy", "d_hidden"):
        assert torch.equal(getattr(first, field), getattr(second, field)), f"{field}: ranks must agree to the bit"
    d_weight = torch.cat([first.d_weight, second.d_weight])
    assert torch.equal(d_weight[VOCAB:], torch.zeros_like(d_weight[VOCAB:]))
    assert error(first._replace(d_weight=d_weight[:VOCAB]), wanted) < TOLERANCE


@pytest.mark.parametrize("shards", [1, 2, 4])
def test_combining_shards_in_one_process(shards, monkeypatch):
    """The combination itself, for more shards than the session has ranks: the last of four is padding alone."""
    c, size = case(), {1: 53, 2: 27, 4: 18}[shards]
    columns = [slice(min(i * size, VOCAB), min((i + 1) * size, VOCAB)) for i in range(shards)]
    logits = [c.hidden @ c.weight[part].t() for part in columns]
    parts = [logprob._stats(x, c.target - part.start, 1 / 0.6) for x, part in zip(logits, columns, strict=True)]

    def all_gather(out, stats, group):
        for place, part in zip(out, parts, strict=True):
            place.copy_(part)

    monkeypatch.setattr(dist, "all_gather", all_gather)
    maximum, total, weighted, picked = logprob._combine(parts[0], 1 / 0.6, _GroupOf(shards))
    wanted = oracle(c, 0.6)
    logp, entropy = (picked - maximum) / 0.6 - total.log(), total.log() - weighted / total
    assert (logp - wanted.logp).abs().max() < TOLERANCE * wanted.logp.abs().max()
    assert (entropy - wanted.entropy).abs().max() < TOLERANCE * wanted.entropy.abs().max()


class _GroupOf:
    def __init__(self, size: int) -> None:
        self.size = lambda: size
