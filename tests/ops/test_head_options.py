"""Heads that do more than multiply: a bias, a scale of the logits, a soft cap; against float64 autograd."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from oracle import GRADIENT, IGNORED, OF_THE_CPU
from test_lm_head import Counted, chunked, head_case
from torch import Tensor

from flowrl_mega.ops import Shard, lm_head_logprob

TAU = 0.6
OPTIONS: dict[str, tuple[bool, dict[str, float]]] = {  # with a bias?
    "bias": (True, {}),
    "scale": (False, {"logit_scale": 0.0625}),
    "scale above 1": (False, {"logit_scale": 3.0}),
    "cap": (False, {"softcap": 5.0}),
    "cap far away": (False, {"softcap": 1000.0}),
    "scale and cap": (False, {"logit_scale": 2.0, "softcap": 5.0}),
    "all": (True, {"logit_scale": 2.0, "softcap": 5.0}),
}


def bent(logits: Tensor, bias: Tensor | None, logit_scale: float = 1.0, softcap: float | None = None) -> Tensor:
    """As the models' own code has it."""
    if bias is not None:
        logits = logits + bias
    logits = logits * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def both(loss_of: Callable[..., tuple[Tensor, ...]], *inputs: Tensor | None) -> tuple[list[Tensor], list[Tensor]]:
    """What it gives, and the gradients of a weighted sum of that with respect to the inputs."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in inputs]
    found = loss_of(*leaves)
    weights = torch.randn(len(found), len(found[0]), generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    torch.autograd.backward(found, [w.to(x.dtype) for w, x in zip(weights, found, strict=True)])
    return [x.detach() for x in found], [x.grad for x in leaves if x is not None]


def exact(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, options: dict[str, float]) -> tuple[Tensor, ...]:
    x = bent(h @ w.t(), b, **options) / TAU
    logps = torch.log_softmax(x, -1)
    found = logps.gather(1, target.clamp(0)[:, None])[:, 0], -(logps.exp() * logps).sum(-1), torch.logsumexp(x, -1)
    return tuple(torch.where(target == IGNORED, 0.0, value) for value in found)


def ours(h: Tensor, w: Tensor, b: Tensor | None, target: Tensor, **options: Any) -> tuple[Tensor, ...]:
    out = lm_head_logprob(h, w, target, bias=b, temperature=TAU, **options)
    assert out.lse is not None
    return out.logp, out.entropy, out.lse


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 1 << 20], ids=["made again", "kept"])
@pytest.mark.parametrize("name", OPTIONS)
def test_equals_float64_autograd(name, budget, dtype, backend, monkeypatch):
    """Values and gradients of hidden, weight and bias, over chunks of columns and blocks of rows."""
    chunked(monkeypatch, 100, 20)
    with_bias, options = OPTIONS[name]
    c = head_case(dtype)
    c.target[5] = IGNORED
    bias = torch.randn(530, generator=torch.Generator().manual_seed(1)).to(dtype) if with_bias else None
    inputs = (c.hidden, c.weight, bias)
    values, gradients = both(
        lambda *x: ours(*x, c.target, **options, logits_budget_bytes=budget, backend=backend), *inputs
    )
    wanted, exactly = both(
        lambda *x: exact(*x, c.target, options), *(None if x is None else x.double() for x in inputs)
    )
    for a, b in zip(values, wanted, strict=True):
        assert (a - b).abs().max() < 3e-6 * b.abs().max()
    for a, b in zip(gradients, exactly, strict=True):
        assert a.dtype == dtype
        assert ((a - b).abs() <= GRADIENT[dtype][0] * b.abs() + 5e-6 * b.abs().max()).all()


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
@pytest.mark.parametrize("name", OPTIONS)
def test_gradcheck(name, backend, monkeypatch):
    """Against finite differences, with a padded vocabulary and a temperature a row."""
    chunked(monkeypatch, 4, 3)
    with_bias, options = OPTIONS[name]
    c = head_case(torch.float64, rows=5, vocab=11)
    tau = torch.linspace(0.6, 1.7, 5)
    bias = [torch.linspace(-1, 1, 11, dtype=torch.float64).requires_grad_()] if with_bias else []

    def outputs(h: Tensor, w: Tensor, b: Tensor | None = None) -> tuple[Tensor, ...]:
        rest = {"temperature": tau, "shard": Shard(0, 10, 10), "logits_budget_bytes": 128, "backend": backend}
        out = lm_head_logprob(h, w, c.target.clamp(max=9), bias=b, **options, **rest)
        return out.logp, out.entropy, out.lse

    hidden, weight = (x[:, :3].clone().requires_grad_() for x in (c.hidden, c.weight))
    assert torch.autograd.gradcheck(outputs, (hidden, weight, *bias))


def test_padding_of_the_bias_is_never_read(backend):
    """As that of the weight."""
    c = head_case()
    weight = torch.cat([c.weight, torch.full((14, 16), torch.nan)]).requires_grad_()
    bias = torch.cat([torch.zeros(530), torch.full((14,), torch.nan)]).requires_grad_()
    out = lm_head_logprob(c.hidden, weight, c.target, bias=bias, shard=Shard(0, 530, 530), backend=backend)
    out.logp.backward(c.grad)
    assert not bias.grad[530:].any() and bias.grad.isfinite().all() and out.logp.isfinite().all()


def test_a_frozen_weight_with_a_bias_that_learns(backend):
    """Each input has its gradient or none."""
    c = head_case()
    bias = torch.zeros(530, requires_grad=True)
    lm_head_logprob(c.hidden, c.weight, c.target, bias=bias, backend=backend).logp.backward(c.grad)
    logits = (c.hidden.double() @ c.weight.double().t()).requires_grad_()
    torch.log_softmax(logits, -1).gather(1, c.target[:, None])[:, 0].backward(c.grad.double())
    wanted = logits.grad.sum(0)
    assert (bias.grad - wanted).abs().max() < 2e-6 * wanted.abs().max()


def test_what_is_not_used_costs_nothing(native):
    """A scale alone is the temperature's affair; no op more than without it."""
    c = head_case()
    calls = []
    for options in ({}, {"logit_scale": 0.5}):
        with Counted() as counted:
            weight = c.weight.clone().requires_grad_()
            lm_head_logprob(c.hidden, weight, c.target, **options).logp.backward(c.grad)
        calls.append(counted.calls)
    assert calls[0] == calls[1] and not {"aten.tanh_.default", "aten.square.default"} & set(calls[0])


@pytest.mark.parametrize("wrong", [{"logit_scale": 2.0}, {"softcap": 5.0}, {}], ids=["scale", "cap", "plain"])
def test_an_option_left_out_would_be_seen(wrong):
    """The bounds have teeth."""
    c = head_case()
    bias, options = torch.ones(530), {"logit_scale": 2.0, "softcap": 5.0}
    wanted = exact(c.hidden.double(), c.weight.double(), bias.double(), c.target, options)
    found = ours(c.hidden, c.weight, bias, c.target, **wrong, backend="torch")
    assert (found[0] - wanted[0]).abs().max() > 1e-2
