"""logprob against log_softmax in float64: values, gradients, and where in memory they come from and go to."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, ENTROPY, IGNORED, LOGP, OF_THE_CPU, Case, Result, agrees, case, excess, oracle, same_bits
from torch import Tensor

from flowrl_mega.ops import logprob

# One column; around the widths of both vector types and of their unrolled loops; around the short runs of the sums
# (8 x 4 vectors) and the block, which is read twice; a vocabulary.
COLUMNS = [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 63, 64, 65, 127, 255, 257, 511, 513, 2047, 2048, 2049, 4113, 32000]
TEMPERATURES = [0.6, 1.0, 1.7]


def ours(c: Case, temperature: float | Tensor = 1.0, inplace: bool = True, **options) -> Result:
    logits = c.logits.detach().clone().requires_grad_()
    out = logprob(logits, c.target, temperature=temperature, inplace_backward=inplace, **options)
    out.logp.backward(c.grad)
    return Result(out.logp.detach(), out.entropy.detach(), logits.grad)


def mixed(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> Case:
    """Flat, usual and nearly one-hot rows."""
    parts = [case(rows, columns, dtype, scale, seed) for seed, scale in enumerate((0.02, 3.0, 30.0))]
    return Case(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))


@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_log_softmax_in_float64(dtype, columns, backend):
    """Every path through the vectors, their tails and the blocks, at every temperature."""
    c = mixed(2, columns, DTYPES[dtype])
    for temperature in TEMPERATURES:
        agrees(ours(c, temperature, backend=backend), oracle(c.logits, c.target, temperature, c.grad))


@pytest.mark.parametrize("dtype", DTYPES)
def test_each_row_can_have_its_own_temperature(dtype, backend):
    """A rollout may mix temperatures, and a row must get its own and not its neighbour's."""
    c, temperature = mixed(4, 300, DTYPES[dtype]), torch.linspace(0.6, 1.7, 12)
    agrees(ours(c, temperature, backend=backend), oracle(c.logits, c.target, temperature, c.grad))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_large_logits(offset, dtype, backend):
    """exp of a raw logit overflows from 89 on, and x / tau - m / tau loses what x - m keeps."""
    c = mixed(4, 2500, torch.float32)
    c = c._replace(
        logits=(c.logits + offset).to(DTYPES[dtype]),
        grad=c.grad.to(torch.float64 if dtype == "fp64" else torch.float32),
    )
    for temperature in TEMPERATURES:
        agrees(ours(c, temperature, backend=backend), oracle(c.logits, c.target, temperature, c.grad))


@pytest.mark.parametrize("columns", [256, 2048, 4096, 32000])
def test_equal_logits_do_not_add_up_their_rounding(columns, backend):
    """Half logits repeat, and equal terms round all the same way: a lane that adds up hundreds of them drifts."""
    rows = 100
    logits = torch.linspace(-14, -0.01, rows)[:, None].repeat(1, columns)
    logits[:, 0] = 0.0
    target = torch.zeros(rows, dtype=torch.long)
    out, wanted = logprob(logits, target, backend=backend), oracle(logits, target)
    allowed = 1 if backend == "native" else 2.5  # for torch's own sums
    assert excess(out.logp, wanted.logp, LOGP) <= allowed
    assert excess(out.entropy, wanted.entropy, ENTROPY) <= allowed


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [5, 64, 301])
def test_rows_may_lie_anywhere(columns, dtype, backend):
    """A view of a larger buffer, off any alignment, gives the same bits, and nothing beside it is written."""
    c = case(5, columns, DTYPES[dtype])
    flat = torch.full((1 + 5 * (columns + 3),), 7.0, dtype=DTYPES[dtype])
    view = flat[1:].view(5, columns + 3)[:, :columns]
    assert view.data_ptr() % 16 and view.stride(0) != columns
    view.copy_(c.logits)
    wanted = ours(c, 0.6, backend=backend)
    buffer = view.requires_grad_()
    found = logprob(buffer, c.target, temperature=0.6, backend=backend)
    found.logp.backward(c.grad)
    assert same_bits(found.logp, wanted.logp) and same_bits(found.entropy, wanted.entropy)
    assert same_bits(view.detach().contiguous(), wanted.gradient), "in place"
    view.detach().fill_(7.0)
    assert torch.equal(flat, torch.full_like(flat, 7.0)), "the buffer around the rows"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("padding", [torch.nan, torch.inf, 1e4], ids=["nan", "inf", "huge"])
def test_padded_columns_are_never_read(padding, dtype, backend):
    """A vocabulary is padded for tensor parallelism; a padded column in the softmax is a known mistake."""
    c = case(6, 301, DTYPES[dtype])
    padded = c._replace(logits=torch.cat([c.logits, torch.full((6, 19), padding, dtype=DTYPES[dtype])], 1))
    wanted, found = ours(c, 0.6, backend=backend), ours(padded, 0.6, backend=backend, vocab_valid=301)
    agrees(found, oracle(padded.logits, c.target, 0.6, c.grad, valid=301))
    assert same_bits(found.logp, wanted.logp) and same_bits(found.entropy, wanted.entropy)
    assert same_bits(found.gradient[:, 301:].contiguous(), torch.zeros(6, 19, dtype=DTYPES[dtype]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_in_place_and_out_of_place_give_the_same_bits(dtype, backend):
    """The fall-back for a second backward must not be another computation."""
    c = mixed(3, 700, DTYPES[dtype])
    a, b = ours(c, 0.6, True, backend=backend), ours(c, 0.6, False, backend=backend)
    assert all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def test_threads_do_not_change_a_bit(backend):
    """Rows are dealt out to threads, and how many there are is the machine's affair."""
    c, before, found = mixed(30, 3000), torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            found.append(ours(c, 0.6, backend=backend))
    finally:
        torch.set_num_threads(before)
    assert all(same_bits(x, y) for other in found[1:] for x, y in zip(found[0], other, strict=True))


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_every_half_is_read_as_what_it_is(dtype, kernels):
    """All 65536 patterns, in a vector and in the tail: subnormals, infinities and NaN too."""
    values = torch.arange(-(2**15), 2**15).to(torch.int16).view(DTYPES[dtype])
    logits = values[:, None].expand(-1, 17).contiguous()
    target = torch.full((len(values),), 16)
    stats = kernels.logprob_stats(logits, target, torch.ones(1), 0, 17, -100, False)
    wanted = values.float()
    finite = wanted.isfinite()
    assert torch.equal(stats[0, finite], wanted[finite]) and torch.equal(stats[3, finite], wanted[finite])
    assert torch.equal(stats[1, finite], torch.full_like(wanted[finite], 17.0))
    assert stats[1, wanted.isnan() | (wanted == torch.inf)].isnan().all()
    assert torch.equal(stats[:2, wanted == -torch.inf], torch.tensor([[-torch.inf], [0.0]]))


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_half_gradients_are_rounded_to_the_nearest(dtype, kernels):
    """Every half, every point half-way between two (to the even one) and their neighbours, overflow and NaN too."""
    halves = torch.arange(0, 2**15).to(torch.int16).view(DTYPES[dtype]).float()
    halves = halves[halves.isfinite()]
    ties = (halves[:-1].double() + halves[1:].double()).div(2).float()
    last = halves[-1] + (halves[-1] - halves[-2]) / 2  # half-way to what would be infinity
    odd = torch.tensor([torch.inf, torch.nan])
    odd = torch.cat([odd, torch.tensor([2**31 - 1, -1], dtype=torch.int32).view(torch.float32)])  # other NaN
    points = torch.cat([halves[1:], ties[1:], last[None], odd])
    down, up = (points.nextafter(torch.tensor(to)) for to in (0.0, torch.inf))
    grad = torch.cat([x * sign for x in (points, down, up) for sign in (1, -1)])
    rows, columns = len(grad), 17
    logits, target = torch.zeros(rows, columns), torch.full((rows,), -1)  # of another shard
    place = (0, columns, IGNORED)
    # e^(0 - 0) - 0 = 1 for each column, so what is stored is -grad.
    half = kernels.logprob_backward(
        logits, target, grad, torch.zeros(rows), torch.zeros(rows), torch.ones(1), *place, DTYPES[dtype]
    )
    wanted = (-grad).to(DTYPES[dtype])[:, None].expand(-1, columns)
    assert dtype == "bf16" or wanted.isinf().sum() > 4 * columns, "overflow"
    assert torch.equal(half.isnan(), wanted.isnan())
    kept = ~wanted[:, 0].isnan() & (grad != 0)
    assert same_bits(half[kept], wanted[kept])


def test_the_gradient_of_a_near_certain_target_does_not_cancel(kernels):
    """1 - e^logp in float32 would have a relative error of 1e-2 at 1 - p = 1e-5; -expm1(logp) keeps its digits."""
    log_sum = 10.0 ** -torch.arange(1, 9)
    rows = len(log_sum)
    place = (0, 3, IGNORED)
    target, ones, zeros = torch.full((rows,), 2), torch.ones(rows), torch.zeros(rows)
    found = kernels.logprob_backward(
        torch.zeros(rows, 3), target, ones, zeros, log_sum, torch.ones(1), *place, torch.float32
    )
    assert excess(found[:, 2], -torch.expm1(-log_sum.double()), (3e-7, 0.0)) <= 1


def test_a_gradient_of_the_wrong_form_would_be_seen():
    """The bounds have teeth: x / tau - m / tau and 1 - p, the obvious forms, break them at large logits."""
    c = case(8, 500, scale=3.0)
    logits = c.logits + 3000
    wanted = oracle(logits, c.target, 0.6, c.grad)
    y = logits / 0.6
    p = (y - y.amax(1, keepdim=True)).exp()
    p /= p.sum(1, keepdim=True)
    onehot = torch.nn.functional.one_hot(c.target, 500)
    obvious = (onehot - p) * c.grad[:, None] / 0.6
    with pytest.raises(AssertionError):
        agrees(Result(wanted.logp.float(), wanted.entropy.float(), obvious), wanted)
