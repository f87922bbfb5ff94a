"""RLOO with the KL in the reward against arXiv 2402.14740 in NumPy, and its target."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_loss, policy_gradient, split
from torch.autograd import grad

from flowrl_mega.objectives import RLOO, LossInputs

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
GROUP = torch.tensor([0, 2, 1, 0, 2, 1, 1, 3])


def advantages(s, o):
    """Of each answer, from the returns R (Eq. 4 and 8)."""
    rows = zip(split(s, s.old_logp), split(s, s.ref_logp), s.credit.tolist(), strict=True)
    terms = {"k1": lambda x: x, "k2": lambda x: x * x / 2, "k3": lambda x: np.expm1(-x) + x}[o.kl_estimator]
    returns = [r - o.kl_coef * terms(old - ref).sum() for old, ref, r in rows]
    found = []
    for i, own in enumerate(returns):
        others = [returns[j] for j in range(len(returns)) if GROUP[j] == GROUP[i] and (o.baseline == "group" or j != i)]
        found.append(own - (np.mean(others) if others else 0.0))
    return found


@pytest.mark.parametrize("baseline", ["others", "group"])
@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "k1"), (0.1, "k1"), (0.1, "k2"), (0.1, "k3")])
def test_rloo_equals_numpy(packed, baseline, kl_coef, estimator):
    """Two micro-batches: a prompt's other answers may be in another one."""
    objective = RLOO(baseline=baseline, kl_coef=kl_coef, **({"kl_estimator": estimator} if kl_coef else {}))
    s = replace(packed(lengths=LENGTHS, drift=0.6, log_z=False), group=GROUP)
    expected = advantages(s, objective)
    cut, token = 4, sum(LENGTHS[:4])
    halves = [
        LossInputs(s.logp[a:b], s.old_logp[a:b], s.ref_logp[a:b], None, s.cu_seqlens[i : j + 1] - a, s.credit[i:j],
                   group=GROUP[i:j])
        for i, j, a, b in ((0, cut, 0, token), (cut, 8, token, sum(LENGTHS)))
    ]  # fmt: skip
    given = objective.prepare(halves, lambda x: x, 4)
    np.testing.assert_allclose(torch.cat([p["advantage"] for p in given]), expected, rtol=1e-12, atol=1e-13)
    s = replace(s, prepared={"advantage": torch.tensor(expected)})
    tokens = [[a] * n for a, n in zip(expected, LENGTHS, strict=True)]
    assert_loss(objective.loss(s), s, *policy_gradient(s, tokens, objective, kl_in_loss=False))


def test_its_target_is_flowrls_with_the_matched_coefficient(strings, ref, reward):
    """At pi_ref e^{r / kl_coef} / Z every return is log Z, every advantage 0, whatever the group."""
    kl_coef = 0.3
    target = (strings.logp(ref) + reward / kl_coef).softmax(0)
    logits = strings.logits_of(target).requires_grad_()
    s = replace(strings.sequences(logits, reward, ref), group=torch.arange(len(strings)) % 5)
    objective = RLOO(kl_coef=kl_coef, loss_mean="sum")
    (given,) = objective.prepare([s], lambda x: x, 5)
    np.testing.assert_allclose(given["advantage"], 0, atol=1e-12)
    np.testing.assert_allclose(grad(objective.loss(replace(s, prepared=given)).loss_sum, logits)[0], 0, atol=1e-10)
