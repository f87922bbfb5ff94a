"""logprob under autograd: gradcheck, the gradient in place of the logits, and what happens to those who read it."""

from __future__ import annotations

import pytest
import torch
from oracle import IGNORED, OF_THE_CPU, case, excess, oracle, same_bits
from torch import Tensor

from flowrl_mega.ops import logprob

OFFSETS = torch.tensor([0, 2, 2, 5])


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
@pytest.mark.parametrize("temperature", [1.0, 0.6, "by row"])
def test_gradcheck(temperature, backend):
    """The analytic gradient against finite differences, through the rows and through the sums over sequences."""
    c = case(5, 11, torch.float64)
    target = c.target.clamp(max=8)
    target[1] = IGNORED
    tau = torch.linspace(0.6, 1.7, 5) if temperature == "by row" else temperature

    def outputs(x: Tensor) -> tuple[Tensor, Tensor]:
        rest = {"temperature": tau, "vocab_valid": 9, "inplace_backward": False}
        out = logprob(x, target, OFFSETS, backend=backend, **rest)
        return out.logp, out.sequence[:, 0]

    assert torch.autograd.gradcheck(outputs, (c.logits.requires_grad_(),))


def test_a_sequence_hands_its_gradient_to_each_of_its_rows(backend):
    """Through logp, through the sums, and through both together."""
    c, d_sums = case(5, 33), torch.tensor([0.3, 9.0, -0.7])
    by_row = d_sums.repeat_interleave(OFFSETS.diff())
    for weights, wanted in (((0, 1), by_row), ((1, 1), by_row + c.grad)):
        logits = c.logits.clone().requires_grad_()
        out = logprob(logits, c.target, OFFSETS, backend=backend)
        loss = weights[0] * (out.logp * c.grad).sum() + weights[1] * (out.sequence[:, 0] * d_sums).sum()
        loss.backward()
        assert excess(logits.grad, oracle(c.logits, c.target, grad=wanted).gradient, (0.0, 1e-6)) <= 1


def test_the_gradient_lies_where_the_logits_lay(backend):
    """That is what saves a second matrix of their size."""
    c = case(4, 50)
    logits = c.logits.clone().requires_grad_()
    logprob(logits, c.target, backend=backend).logp.backward(c.grad)
    assert logits.grad.data_ptr() == logits.data_ptr()
    kept = c.logits.clone().requires_grad_()
    logprob(kept, c.target, inplace_backward=False, backend=backend).logp.backward(c.grad)
    assert same_bits(kept.detach(), c.logits) and kept.grad.data_ptr() != kept.data_ptr()


def test_a_second_backward_raises_in_place_and_works_out_of_place(backend):
    """In place it would take the gradient for logits, and give numbers that look like any others."""
    c = case(4, 50)
    logits = c.logits.clone().requires_grad_()
    out = logprob(logits, c.target, backend=backend)
    out.logp.backward(c.grad, retain_graph=True)
    with pytest.raises(RuntimeError, match="overwritten.*inplace_backward=False"):
        out.logp.backward(c.grad)

    logits = c.logits.clone().requires_grad_()
    out = logprob(logits, c.target, inplace_backward=False, backend=backend)
    first, second = (torch.autograd.grad(out.logp, logits, c.grad, retain_graph=True)[0] for _ in range(2))
    assert same_bits(first, second)


def test_a_second_reader_of_overwritten_logits_raises(backend):
    """Two temperatures on the same logits: the second backward must not run on the first one's gradient."""
    c = case(4, 50)
    logits = c.logits.clone().requires_grad_()
    outs = [logprob(logits, c.target, temperature=tau, backend=backend) for tau in (1.0, 2.0)]
    with pytest.raises(RuntimeError, match="overwritten"):
        sum(out.logp.sum() for out in outs).backward()


def test_overwriting_what_another_op_has_saved_raises(backend):
    """tanh keeps its result for its own backward: torch notices only if the kernel's write is made known."""
    c = case(4, 50)
    logits = c.logits.clone().requires_grad_()
    out = logprob(logits.tanh(), c.target, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.logp.sum().backward()
    capped = logprob(30 * (logits / 30).tanh(), c.target, backend=backend)  # nothing keeps this product
    capped.logp.backward(c.grad)
    wanted = c.logits.double().requires_grad_()
    (30 * (wanted / 30).tanh()).log_softmax(-1).gather(1, c.target[:, None])[:, 0].backward(c.grad.double())
    assert excess(logits.grad, wanted.grad, (0.0, 1e-6)) <= 1


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_without_gradient(mode, backend):
    """Scoring gives the same bits and no graph, also on inference tensors, which have no version counter."""
    c = case(4, 50)
    wanted = logprob(c.logits.clone().requires_grad_(), c.target, backend=backend)
    with mode():
        found = logprob(c.logits.clone(), c.target, backend=backend)
    assert not found.logp.requires_grad
    assert all(same_bits(x, y) for x, y in zip(found, wanted, strict=True))


def test_the_gradient_of_the_gradient_raises(backend):
    """The kernels are opaque to autograd, which would call it 0 and warn."""
    c = case(4, 50)
    logits = c.logits.clone().requires_grad_()
    out = logprob(logits, c.target, inplace_backward=False, backend=backend)
    (first,) = torch.autograd.grad(out.logp, logits, c.grad.requires_grad_(), create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        first.sum().backward()
