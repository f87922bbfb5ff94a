"""Under torch.autocast: logits are float32 all the same, since a half logit is no logit of a long answer."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, case
from test_lm_head import TOLERANCE, all_same, error, head_case, head_oracle, ours

from flowrl_mega.ops import lm_head_logprob, logprob

HALVES = ["bf16", "fp16"]


@pytest.mark.parametrize("to", HALVES)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_the_head_is_as_exact_as_without(budget, dtype, to, backend):
    """The same bits forward and backward, also where logits are made again; half parameters round their gradient."""
    c = head_case(DTYPES[dtype])
    wanted = ours(c, 0.6, backend=backend, logits_budget_bytes=budget)
    with torch.autocast("cpu", DTYPES[to]):
        found = ours(c, 0.6, backend=backend, logits_budget_bytes=budget)
    assert all_same(found, wanted)
    exact = head_oracle(c, 0.6)
    assert error(found[:2], exact[:2]) < TOLERANCE
    assert error(found, exact) < (TOLERANCE if dtype == "fp32" else 2**-8)


def test_a_half_hidden_state_and_a_float_weight(backend):
    """What autocast makes of a layer before the head, and whose gradient then comes back as a half."""
    c, weight = head_case(), head_case().weight.requires_grad_()
    layer = torch.nn.Linear(c.hidden.shape[1], c.hidden.shape[1], bias=False)
    with torch.autocast("cpu", torch.bfloat16):
        hidden = layer(c.hidden)
        assert hidden.dtype == torch.bfloat16
        hidden.retain_grad()
        out = lm_head_logprob(hidden, weight, c.target, backend=backend)
    out.logp.backward(c.grad)
    exact = head_oracle(c._replace(hidden=hidden.detach()))
    found = (out.logp.detach(), out.entropy.detach(), weight.grad)
    assert error(found, (exact.logp, exact.entropy, exact.d_weight)) < TOLERANCE
    assert hidden.grad.dtype == torch.bfloat16 and error([hidden.grad], [exact.d_hidden]) < 2**-8
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_logprob_is_as_exact_as_without(dtype, backend):
    c, found = case(5, 301, DTYPES[dtype]), []
    for enabled in (False, True):
        logits = c.logits.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
            out = logprob(logits, c.target, temperature=0.6, backend=backend)
            out.logp.backward(c.grad)
        found.append((out.logp.detach(), out.entropy.detach(), logits.grad))
    assert all_same(*found)
