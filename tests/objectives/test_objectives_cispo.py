"""CISPO against arXiv 2506.13585 in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_loss, split
from torch.autograd import grad

from flowrl_mega.objectives import CISPO, GRPO

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)


def cispo_numpy(s, o):
    """Mean loss, d loss / d logp [T] and metrics (Eq. 4-5): the weight is a number, the gradient is log pi's."""
    tokens, loss, gradient, metrics = sum(LENGTHS), 0.0, [], []
    for logp, old, a in zip(split(s, s.logp), split(s, s.old_logp), s.credit.tolist(), strict=True):
        share = {"token": 1 / tokens, "sequence": 1 / len(LENGTHS) / len(logp), "sum": 1 / len(LENGTHS)}[o.loss_mean]
        ratio = np.exp(logp - old)
        weight = np.clip(ratio, 0 if o.clip_eps is None else 1 - o.clip_eps, 1 + o.clip_eps_high)
        loss += -(share * weight * a * logp).sum()
        gradient += list(-share * weight * a)
        metrics.append((a, ratio.mean(), (weight != ratio).mean(), logp.mean(), abs((logp - old).sum())))
    names = ["loss/advantage", "policy/ratio", "policy/clip_fraction", "policy/mean_logp", "policy/max_abs_log_ratio"]
    return loss, np.array(gradient), dict(zip(names, np.array(metrics).T, strict=True))


@pytest.mark.parametrize("loss_mean", ["token", "sequence", "sum"])
@pytest.mark.parametrize("clip", [{}, {"clip_eps": 0.3}, {"clip_eps_high": 1.0}])
def test_cispo_equals_numpy(packed, clip, loss_mean):
    objective = CISPO(loss_mean=loss_mean, **clip)
    s = packed(lengths=LENGTHS, drift=0.6, log_z=False, reference=False)
    expected = cispo_numpy(s, objective)
    assert 0 < expected[2]["policy/clip_fraction"].mean() < 1
    assert_loss(objective.loss(s), s, *expected)


def test_no_token_loses_its_gradient(packed):
    """What sets it apart from the clipped surrogate (section 3.1)."""
    s = packed(lengths=LENGTHS, drift=0.6, log_z=False, reference=False)
    grpo = grad(GRPO().loss(s).loss_sum, s.logp)[0]
    cispo = grad(CISPO().loss(s).loss_sum, s.logp)[0]
    assert (grpo == 0).any() and not (cispo == 0).any()


def test_at_the_first_update_it_is_the_policy_gradient(packed):
    s = packed(lengths=LENGTHS, log_z=False, reference=False)
    s = replace(s, old_logp=s.logp.detach())
    slopes = [grad(o.loss(s).loss_sum, s.logp)[0] for o in (CISPO(), GRPO(loss_mean="token"))]
    torch.testing.assert_close(*slopes)
