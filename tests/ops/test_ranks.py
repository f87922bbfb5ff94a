"""The lm-head on real gloo ranks that share the vocabulary."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from oracle import IGNORED, same_bits
from rank_pool import RankPool
from test_lm_head import HIDDEN, TOLERANCE, VOCAB, HeadCase, HeadResult, all_same, error, head_case, head_oracle, ours
from torch import Tensor

from flowrl_mega.ops import Shard, build, kernels, lm_head, lm_head_logprob

COLLECTIVES = """all_gather all_gather_into_tensor all_reduce all_to_all all_to_all_single barrier broadcast gather
reduce reduce_scatter reduce_scatter_tensor scatter send recv isend irecv"""


class OfRank(NamedTuple):
    """What one rank got, the last of some runs."""

    result: HeadResult
    sequence: Tensor
    repeats: bool  # to the bit, in every run, and in scoring
    collectives: list[list[str]]  # of each run, by name; scoring comes last


@contextmanager
def counted() -> Iterator[list[str]]:
    """The names of the collectives that are called."""
    calls: list[str] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES.split()}

    def watched(name: str) -> Any:
        return lambda *args, **kwargs: calls.append(name) or real[name](*args, **kwargs)

    for name in real:
        setattr(dist, name, watched(name))
    try:
        yield calls
    finally:
        for name, function in real.items():
            setattr(dist, name, function)


def whole_case(spoiled: int | None = None) -> HeadCase:
    """The same on all ranks; row `spoiled` of the weight is NaN."""
    c = head_case()
    c.target[4] = IGNORED
    if spoiled is not None:
        c.weight[spoiled] = torch.nan
    return c


def shard_of(c: HeadCase, size: int, padding: float) -> tuple[HeadCase, Shard]:
    """This rank's part of a vocabulary padded to `size` rows of the weight a rank."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    start, world = dist.get_rank() * size, dist.get_world_size()
    fill = torch.full((size * world - len(c.weight), HIDDEN), padding, dtype=c.weight.dtype)
    weight = torch.cat([c.weight, fill])[start : start + size]
    return c._replace(weight=weight), Shard(start, max(0, min(size, len(c.weight) - start)), len(c.weight))


def on_rank(
    size: int,
    padding: float,
    backend: str,
    times: int = 1,
    spoiled: int | None = None,
    **options: Any,
) -> OfRank:
    mine, shard = shard_of(whole_case(spoiled), size, padding)
    options |= {"shard": shard, "group": dist.group.WORLD, "backend": backend, "temperature": 0.6}
    options["cu_seqlens"] = torch.tensor([0, 5, 5, len(mine.target)])
    results, collectives = [], []
    for _ in range(times):
        with counted() as calls:
            results.append(ours(mine, **options))
        collectives.append(calls)
    with torch.no_grad(), counted() as calls:
        scored = lm_head_logprob(mine.hidden, mine.weight, mine.target, **options)
    collectives.append(calls)
    logps = [*(result.logp for result in results), scored.logp]
    repeats = all(all_same(result, results[0]) for result in results) and all(same_bits(x, logps[0]) for x in logps)
    return OfRank(results[-1], scored.sequence, repeats, collectives)


def in_narrow_chunks(*args: Any, **options: Any) -> OfRank:
    """50 columns and 5 rows each: the ranks of one case then have unlike numbers of chunks that are not void."""
    with mock.patch.dict(lm_head._TILE, cpu=50), mock.patch.dict(lm_head._CHUNK_BYTES, cpu=4 * 50 * 5):
        return on_rank(*args, **options)


def check(found: list[OfRank]) -> None:
    """Against the oracle; the ranks agree to the bit."""
    first = found[0]
    for other in found[1:]:
        for name in ("logp", "entropy", "d_hidden"):
            assert same_bits(getattr(other.result, name), getattr(first.result, name)), name
        assert same_bits(other.sequence, first.sequence)
    d_weight = torch.cat([rank.result.d_weight for rank in found])
    assert torch.equal(d_weight[VOCAB:], torch.zeros_like(d_weight[VOCAB:])), "padding"
    assert error(first.result._replace(d_weight=d_weight[:VOCAB]), head_oracle(whole_case(), 0.6)) < TOLERANCE


@pytest.fixture(scope="module")
def ranks4() -> Iterator[RankPool]:
    pool = RankPool(4, megatron=False)
    yield pool
    pool.close()


@pytest.fixture(params=["torch", "native"])
def name(request: pytest.FixtureRequest) -> str:
    """The ranks load what was built here."""
    return "torch" if request.param == "torch" else request.getfixturevalue("native")


SIZES = {
    "2-tight": (2, 265),
    "2-padded": (2, 300),
    "2-one-is-padding": (2, 600),
    "4-tight": (4, 133),
    "4-one-is-padding": (4, 200),
    "4-three-are-padding": (4, 530),
}


@pytest.mark.ranks
@pytest.mark.parametrize("padding", [torch.nan, 1e4], ids=["nan", "huge"])
@pytest.mark.parametrize(("world", "size"), SIZES.values(), ids=SIZES)
def test_ranks_share_the_vocabulary(world, size, padding, name, request):
    """Values and gradients of the whole, the same bits on every rank, down to ranks that hold nothing but padding."""
    pool = request.getfixturevalue(f"ranks{world}")
    for function in (on_rank, in_narrow_chunks):
        check(pool.run(function, size, padding, name))


@pytest.mark.ranks
@pytest.mark.parametrize(("world", "size"), [(2, 300), (4, 150)])
def test_ten_runs_give_the_same_bits_with_one_all_gather_each(world, size, name, request):
    """A sum in the order of arrival would differ from run to run; the backward's one sum is that of d hidden."""
    found = request.getfixturevalue(f"ranks{world}").run(on_rank, size, torch.nan, name, times=10)
    check(found)
    for rank in found:
        assert rank.repeats
        assert rank.collectives == [["all_gather_into_tensor", "all_reduce"]] * 10 + [["all_gather_into_tensor"]]


@pytest.mark.ranks
def test_the_caller_can_sum_the_gradient_of_hidden_itself(name, ranks2):
    """Sequence parallelism reduce-scatters it: each rank gives its part, and no collective is spent."""
    found = ranks2.run(on_rank, 300, torch.nan, name, reduce_gradient=False)
    wanted = head_oracle(whole_case(), 0.6).d_hidden
    parts = [rank.result.d_hidden for rank in found]
    assert (sum(parts) - wanted).abs().max() < TOLERANCE * wanted.abs().max()
    assert all((part - wanted).abs().max() > 0.1 * wanted.abs().max() for part in parts)
    assert all(calls == ["all_gather_into_tensor"] for rank in found for calls in rank.collectives)


@pytest.mark.ranks
def test_a_nan_on_one_rank_is_a_nan_on_all(name, ranks2):
    """Otherwise one rank would skip the update and another make it."""
    read = whole_case().target != IGNORED
    for rank in ranks2.run(on_rank, 300, 0.0, name, spoiled=400):
        assert all(x[read].isnan().all() for x in rank.result[:3])


def on_a_rank_without_compiler(poor: int, backend: str) -> list[str]:
    """What two calls say; rank `poor` finds no library."""
    mine, shard = shard_of(whole_case(), 300, 0.0)
    options = {"shard": shard, "group": dist.new_group(), "backend": backend}
    with ExitStack() as stack:
        if dist.get_rank() == poor:
            stack.enter_context(mock.patch.object(kernels, "_fault", lambda kind: "no C++ compiler found, none"))
            stack.enter_context(mock.patch.object(kernels, "load", mock.Mock(side_effect=build.BuildError("no g++"))))
        said = []
        for _ in range(2):
            try:
                lm_head_logprob(mine.hidden, mine.weight, mine.target, **options)
                said.append("")
            except (ValueError, build.BuildError) as error:
                said.append(str(error))
    return said


@pytest.mark.ranks
@pytest.mark.parametrize("poor", [0, 1])
@pytest.mark.parametrize("backend", ["auto", "native"])
def test_a_rank_with_other_kernels_is_refused_on_all(backend, poor, native, ranks2):
    """Each time, with the rank and the reason: alone it would fall back to plain torch and hold other bits."""
    reason = "plain torch, since no C[+][+] compiler found, none" if backend == "auto" else "none, since no g[+][+]"
    for said in ranks2.run(on_a_rank_without_compiler, poor, backend):
        for text in said:
            assert re.search(rf"ops.backend = {backend}: ranks that share a vocabulary must run the same kernels", text)
            assert re.search(rf"rank {poor}: {reason}", text) and f"rank {1 - poor}: native CPU kernels" in text


@pytest.mark.ranks
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_ranks_with_the_same_kernels_are_not_refused(backend, native, ranks2):
    """Also where none has a library: then all run plain torch."""
    assert ranks2.run(on_a_rank_without_compiler, -1, backend) == [["", ""]] * 2
    if backend == "torch":
        assert ranks2.run(on_a_rank_without_compiler, 0, backend) == [["", ""]] * 2
