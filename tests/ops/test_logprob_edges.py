"""What a row of logits may hold besides ordinary numbers, and shapes at the ends of what is legal."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, ENTROPY, IGNORED, LOGP, Case, Result, agrees, case, excess, oracle, same_bits
from torch import Tensor

from flowrl_mega.ops import logprob


def ours(c: Case, backend: str, **options) -> Result:
    logits = c.logits.detach().clone().requires_grad_()
    out = logprob(logits, c.target, backend=backend, **options)
    out.logp.backward(c.grad)
    return Result(out.logp.detach(), out.entropy, logits.grad)


def zero_bits(x: Tensor) -> bool:
    return same_bits(x, torch.zeros_like(x))


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("held", [torch.nan, torch.inf, -torch.inf])
def test_ignored_rows_are_exactly_0(held, dtype, inplace, backend):
    """A row that nobody asked for may hold anything, and 0 x NaN would be NaN in the weight's gradient."""
    c = case(7, 67, DTYPES[dtype])
    c.target[[0, 3, 6]] = IGNORED
    c.logits[[0, 3]] = held
    found = ours(c, backend, inplace_backward=inplace)
    agrees(found, oracle(c.logits, c.target, grad=c.grad))
    assert all(zero_bits(x[[0, 3, 6]]) for x in found)
    assert (found.gradient[[1, 2, 4, 5]] != 0).any(1).all()


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", DTYPES)
def test_rows_without_gradient_are_stored_as_0(dtype, inplace, backend):
    """In place, a row that is skipped would leave its logits behind as a gradient; NaN in it must not pass either."""
    c = case(5, 67, DTYPES[dtype])
    c.logits[3] = torch.nan
    c.grad[[1, 3]] = 0.0
    found = ours(c, backend, inplace_backward=inplace)
    assert zero_bits(found.gradient[[1, 3]])
    assert (found.gradient[[0, 2, 4]] != 0).any(1).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_come_out_as_nan(bad, dtype, backend):
    """Vector maxima drop NaN: a model gone wrong must be seen, wherever in the row, and in that row alone."""
    columns = 2100
    places = [0, 5, 16, 63, 700, 2047, 2048, 2099]
    c = case(len(places) + 1, columns, DTYPES[dtype])
    for row, column in enumerate(places):
        c.logits[row, column] = bad
    found = ours(c, backend)
    assert found.logp[:-1].isnan().all() and found.entropy[:-1].isnan().all()
    assert found.gradient[:-1].isnan().any(1).all(), "the gradient norm sees it"
    last = Case(c.logits[-1:], c.target[-1:], c.grad[-1:])
    agrees(Result(*(x[-1:] for x in found)), oracle(*last[:2], grad=last.grad))


@pytest.mark.parametrize("columns", [3, 16, 67, 2100])
def test_nan_beside_nothing_but_masked_logits(columns, backend):
    """The maximum of such a row is -inf, which elsewhere means that there is nothing to see."""
    c = case(2, columns)
    c.logits[:] = -torch.inf
    c.logits[0, columns // 2] = c.logits[1, 0] = torch.nan
    assert ours(c, backend).logp.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES)
def test_masked_logits(dtype, backend):
    """-inf is how sampling masks ids: probability 0, no share in the entropy, no gradient; whole blocks of it too."""
    c = case(6, 4200, DTYPES[dtype])
    c.logits[0, 1::2] = -torch.inf
    c.logits[1, :2048] = -torch.inf  # the first block
    c.logits[2, 2048:] = -torch.inf
    c.logits[3, torch.arange(4200) != c.target[3]] = -torch.inf  # one id is left
    c.logits[4, c.target[4]] = -torch.inf  # a masked target
    wanted, found = oracle(c.logits, c.target, 0.6, c.grad), ours(c, backend, temperature=0.6)
    agrees(found, wanted)
    assert found.logp[3] == 0.0 and found.entropy[3] == 0.0 and found.logp[4] == -torch.inf


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [1, 17, 2100])
def test_a_row_that_is_all_masked_is_nan(columns, dtype, backend):
    """As in log_softmax: there is no distribution."""
    c = case(2, columns, DTYPES[dtype])
    c.logits[0] = -torch.inf
    found, wanted = ours(c, backend), oracle(c.logits, c.target, grad=c.grad)
    assert wanted.logp[0].isnan() and found.logp[0].isnan() and found.entropy[0].isnan()
    assert found.gradient[0].isnan().all()
    assert found.logp[1].isfinite() and found.gradient[1].isfinite().all()


@pytest.mark.parametrize("temperature", [1e-6, 1e-3, 1e3, 1e6])
def test_extreme_temperatures(temperature, backend):
    """Greedy and uniform limits neither overflow nor become NaN."""
    c = case(6, 300)
    found, wanted = ours(c, backend, temperature=temperature), oracle(c.logits, c.target, temperature, c.grad)
    agrees(
        found._replace(gradient=found.gradient * temperature), wanted._replace(gradient=wanted.gradient * temperature)
    )
    c = case(6, 300, torch.bfloat16)
    c.logits[0, 1::2] = -torch.inf
    found, wanted = ours(c, backend, temperature=temperature), oracle(c.logits, c.target, temperature)
    assert excess(found.logp, wanted.logp, LOGP) <= 1 and excess(found.entropy, wanted.entropy, ENTROPY) <= 1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "columns", "offsets"), [(0, 9, [0]), (0, 9, [0, 0, 0]), (0, 0, [0]), (3, 0, [0, 3])])
def test_empty(rows, columns, offsets, dtype, backend):
    """A micro-batch without response rows, without sequences, without a vocabulary."""
    logits = torch.empty(rows, columns, dtype=DTYPES[dtype], requires_grad=True)
    target = torch.full((rows,), IGNORED)
    out = logprob(logits, target, torch.tensor(offsets), backend=backend)
    assert out.logp.shape == out.entropy.shape == (rows,)
    assert zero_bits(out.sequence) and out.sequence.shape == (len(offsets) - 1, 3)
    (out.logp.sum() + out.sequence.sum()).backward()
    assert logits.grad.shape == logits.shape


def test_one_column_is_certain(backend):
    """log 1 = 0 and no gradient, with nothing else in the row to hide behind."""
    c = case(3, 1)
    found = ours(c, backend, temperature=0.6)
    assert all(torch.equal(x, torch.zeros_like(x)) for x in found)


def test_offsets_beyond_2_to_the_31(backend):
    """Row offsets that 32 bits cannot hold; the memory between the rows is never touched, so it costs nothing."""
    stride, columns = 2**30 + 8, 100
    try:
        far = torch.empty(2 * stride + columns, dtype=torch.bfloat16)
    except RuntimeError as error:
        pytest.skip(f"no 4 GiB of address space: {error}")
    view, c = far.as_strided((3, columns), (stride, 1)), case(3, columns, torch.bfloat16)
    view.copy_(c.logits)
    out = logprob(view.requires_grad_(), c.target, temperature=0.6, backend=backend)
    out.logp.backward(c.grad)
    agrees(Result(out.logp.detach(), out.entropy, view.detach().contiguous()), oracle(*c[:2], 0.6, c.grad))
