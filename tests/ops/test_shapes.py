"""Inputs as other libraries have them: batches of sequences, int32 labels, two floating types, a temperature a row."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, GRADIENT, IGNORED, Result, agrees, case, excess, oracle, same_bits
from test_lm_head import HeadResult, chunked, error, head_case, head_oracle
from torch import Tensor

from flowrl_mega.ops import lm_head_logprob, logprob
from flowrl_mega.ops.logprob import _matrices

BATCH, LENGTH, VOCAB = 3, 5, 300

# How [B, S, V] lies in memory: a buffer's shape, and the view of it.
LAYOUTS = {
    "contiguous": ((3, 5, VOCAB), lambda x: x),
    "all but the last position": ((3, 6, VOCAB), lambda x: x[:, :-1]),
    "all but the first": ((3, 6, VOCAB), lambda x: x[:, 1:]),
    "sequence first": ((5, 3, VOCAB), lambda x: x.transpose(0, 1)),
    "padded vocabulary": ((3, 5, VOCAB + 20), lambda x: x[..., :VOCAB]),
    "every other sequence": ((6, 5, VOCAB), lambda x: x[::2]),
}


def batch_of(layout: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """The buffer, and [B, S, V] as a view of it with case()'s numbers."""
    shape, view = LAYOUTS[layout]
    buffer = torch.full(shape, 7.0, dtype=dtype)
    logits = view(buffer)
    logits.copy_(case(BATCH * LENGTH, VOCAB, dtype).logits.view(BATCH, LENGTH, VOCAB))
    return buffer, logits


@pytest.mark.parametrize("inplace", [True, False])
@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp64"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_of_sequences_gives_what_its_rows_do(layout, dtype, inplace, backend):
    """To the bit; in place the gradient lies in the view, and the buffer beside it is as it was."""
    c = case(BATCH * LENGTH, VOCAB, DTYPES[dtype])
    tau = torch.linspace(0.6, 1.7, BATCH * LENGTH)
    c.target[4] = IGNORED
    flat = c.logits.clone().requires_grad_()
    offsets = torch.arange(BATCH + 1) * LENGTH
    wanted = logprob(flat, c.target, offsets, temperature=tau, backend=backend)
    wanted.logp.backward(c.grad)

    buffer, logits = batch_of(layout, DTYPES[dtype])
    batch = logits.requires_grad_()
    target, grad = (x.view(BATCH, LENGTH) for x in (c.target, c.grad))
    rest = {"temperature": tau.view(BATCH, LENGTH), "inplace_backward": inplace, "backend": backend}
    found = logprob(batch, target.int(), **rest)
    assert found.logp.shape == found.entropy.shape == (BATCH, LENGTH)
    (gradient,) = torch.autograd.grad(found.logp, batch, grad)
    assert same_bits(found.logp.flatten(), wanted.logp) and same_bits(found.entropy.flatten(), wanted.entropy)
    assert same_bits(found.sequence, wanted.sequence), "one sequence for each of B"
    assert same_bits(gradient.reshape(-1, VOCAB), flat.grad)
    assert (gradient.data_ptr() == batch.data_ptr()) == inplace
    logits.detach().fill_(7.0)
    assert torch.equal(buffer.detach(), torch.full_like(buffer, 7.0)), "the buffer around the rows"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_scoring_a_batch_copies_no_logits(layout):
    """The kernels are handed views."""
    _, logits = batch_of(layout, torch.float32)
    parts = [x for x, _ in _matrices(logits)]
    assert sum(len(x) for x in parts) == BATCH * LENGTH
    assert all(x.untyped_storage().data_ptr() == logits.untyped_storage().data_ptr() for x in parts)
    assert len(parts) == (1 if layout in ("contiguous", "padded vocabulary") else 3)


@pytest.mark.parametrize("shape", [(0, 5, 9), (3, 0, 9), (1, 1, 9), (1, 4, 1), (4, 1, 9)])
def test_batches_at_the_ends(shape, backend):
    """Nothing, one sequence, one position, one id."""
    logits = torch.randn(shape).requires_grad_()
    out = logprob(logits, torch.zeros(shape[:2], dtype=torch.int32), backend=backend)
    out.logp.sum().backward()
    assert out.logp.shape == shape[:2] and out.sequence.shape == (shape[0], 3) and logits.grad.shape == shape


def test_offsets_cut_a_batch_anywhere(backend):
    """They count its rows one sequence after the other."""
    c = case(BATCH * LENGTH, VOCAB)
    offsets = torch.tensor([0, 2, 7, 15], dtype=torch.int32)
    batch = logprob(c.logits.view(3, 5, -1), c.target.view(3, 5), offsets, backend=backend)
    assert same_bits(batch.sequence, logprob(c.logits, c.target, offsets, backend=backend).sequence)


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_labels(dtype, backend):
    """int32, as data loaders give them."""
    c, h = case(6, 50), head_case()
    c.target[2] = IGNORED
    logits = c.logits.clone().requires_grad_()
    out = logprob(logits, c.target.to(dtype), backend=backend)
    out.logp.backward(c.grad)
    agrees(Result(out.logp.detach(), out.entropy.detach(), logits.grad), oracle(c.logits, c.target, grad=c.grad))
    found, wanted = (lm_head_logprob(h.hidden, h.weight, x, backend=backend) for x in (h.target.to(dtype), h.target))
    assert same_bits(found.logp, wanted.logp)


# The head


@pytest.mark.parametrize("main_grad", [True, False])
@pytest.mark.parametrize("budget", [0, 1 << 20])
@pytest.mark.parametrize(("hidden", "weight"), [("bf16", "fp32"), ("fp32", "bf16"), ("fp16", "bf16"), ("fp32", "fp64")])
def test_two_types(hidden, weight, budget, main_grad, backend, monkeypatch):
    """The wider one multiplies, so the result is that of their exact values; each gradient comes in its own type."""
    chunked(monkeypatch, 100, 20)
    c = head_case()
    c = c._replace(hidden=c.hidden.to(DTYPES[hidden]), weight=c.weight.to(DTYPES[weight]))
    h, w = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    if main_grad:
        w.main_grad = torch.zeros(w.shape)
    out = lm_head_logprob(h, w, c.target, temperature=0.6, logits_budget_bytes=budget, backend=backend)
    out.logp.backward(c.grad.to(out.logp.dtype))
    wanted = head_oracle(c, 0.6)
    assert (out.logp - wanted.logp).abs().max() < 1e-5 and (out.entropy - wanted.entropy).abs().max() < 1e-5
    d_weight = w.main_grad if main_grad else w.grad
    assert h.grad.dtype == h.dtype and d_weight.dtype == (torch.float32 if main_grad else w.dtype)
    assert (w.grad is None) == main_grad
    for found, right in ((h.grad, wanted.d_hidden), (d_weight, wanted.d_weight)):
        rounding = GRADIENT[found.dtype][0] * right.abs()
        assert ((found - right).abs() <= rounding + 5e-6 * right.abs().max()).all()


@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_a_temperature_a_row(budget, backend, monkeypatch):
    """A rollout may mix temperatures; blocks of rows must take their own, also where rows are selected."""
    chunked(monkeypatch, 100, 10)
    c = head_case()
    rows, tau = torch.arange(36, -1, -2), torch.linspace(0.6, 1.7, 19)
    h, w = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    options = {"rows": rows, "temperature": tau, "logits_budget_bytes": budget, "backend": backend}
    out = lm_head_logprob(h, w, c.target[rows], **options)
    out.logp.backward(c.grad[rows])
    found = HeadResult(out.logp.detach(), out.entropy.detach(), h.grad, w.grad)
    everywhere = torch.ones(37).index_copy(0, rows, tau)[:, None]
    wanted = head_oracle(c._replace(grad=torch.zeros(37).index_copy(0, rows, c.grad[rows])), everywhere)
    assert error(found, wanted._replace(logp=wanted.logp[rows], entropy=wanted.entropy[rows])) < 2e-6


def test_a_batch_of_hidden_states(backend):
    """[B, S, H] without its last position, as a causal model's loss takes it, gives what its rows do."""
    c = head_case(rows=24)
    batch = c.hidden.view(4, 6, -1).clone().requires_grad_()
    target = c.target.view(4, 6)[:, 1:]
    out = lm_head_logprob(batch[:, :-1], c.weight, target, backend=backend)
    out.logp.backward(c.grad.view(4, 6)[:, 1:])
    rows = c.hidden.view(4, 6, -1)[:, :-1].reshape(20, -1).requires_grad_()
    offsets = torch.arange(5) * 5
    wanted = lm_head_logprob(rows, c.weight, target.flatten(), cu_seqlens=offsets, backend=backend)
    wanted.logp.backward(c.grad.view(4, 6)[:, 1:].flatten())
    assert out.logp.shape == (4, 5) and same_bits(out.logp.flatten(), wanted.logp)
    assert same_bits(out.sequence, wanted.sequence)
    assert same_bits(batch.grad[:, :-1].reshape(20, -1), rows.grad) and not batch.grad[:, -1].any()


def test_the_bounds_have_teeth():
    """bf16 logits of a bf16 hidden state, which is what a cast of the weight would give."""
    c = head_case()
    wanted = head_oracle(c._replace(hidden=c.hidden.bfloat16()))
    cast = torch.log_softmax((c.hidden.bfloat16() @ c.weight.bfloat16().t()).float(), -1)
    assert excess(cast.gather(1, c.target[:, None])[:, 0], wanted.logp, (0.0, 1e-5)) > 100
