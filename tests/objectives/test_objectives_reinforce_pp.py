"""REINFORCE++ against arXiv 2501.03262 in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_loss, kl, normalised, policy_gradient, split

from flowrl_mega.objectives import ReinforcePP

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)


def to_go_numpy(s, o):
    """r(x, y) - kl_coef sum_{i >= t} KL_i, one array a sequence (Eq. 8-9): the reward comes at the end and the KL at
    every token, so a token answers for what comes after it."""
    refs = split(s, s.ref_logp) if o.kl_coef else split(s, s.old_logp)
    out = []
    for old, ref, credit in zip(split(s, s.old_logp), refs, s.credit.tolist(), strict=True):
        kls = [kl(*token, o.kl_estimator)[0] for token in zip(old, ref, strict=True)]
        out.append(np.array([credit - o.kl_coef * sum(kls[t:]) for t in range(len(old))]))
    return out


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("high", [None, 0.4])
@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "k1"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
def test_loss_equals_numpy(packed, kl_coef, estimator, high, loss_mean):
    """From the reward to loss, gradient and metrics. The KL is in the advantage alone: were it in the loss too, the
    gradient would show it."""
    objective = ReinforcePP(clip_eps_high=high, kl_coef=kl_coef, kl_estimator=estimator, loss_mean=loss_mean)
    s = packed(lengths=LENGTHS, drift=0.6, log_z=False, reference=kl_coef > 0)
    s = replace(s, prepared=objective.prepare([s], lambda x: x, 8)[0])
    expected = policy_gradient(s, normalised(to_go_numpy(s, objective)), objective, kl_in_loss=False)
    out = objective.loss(s)
    assert out.count == (sum(LENGTHS) if loss_mean == "token" else len(LENGTHS))
    assert 0 < expected[2]["policy/clip_fraction"].mean() < 1
    assert_loss(out, s, *expected)


def test_advantages_are_normalised_over_tokens(packed):
    """Over all tokens of the step, not over answers: an answer of 9 tokens counts nine times in mean and variance."""
    s = packed(lengths=LENGTHS, log_z=False)
    advantage = ReinforcePP().prepare([s], lambda x: x, 8)[0]["advantage"]
    assert abs(advantage.mean().item()) < 1e-12 and advantage.var().item() == pytest.approx(1, abs=1e-6)
    by_answer = advantage[s.cu_seqlens[1:] - 1]
    assert abs(by_answer.mean().item()) > 1e-2, "mean 0 over answers too: the batch says nothing"


@pytest.mark.parametrize("baseline", ["none", "group"])
def test_credit(rng, baseline):
    """The raw reward, or what it is above the mean of its prompt's answers (not divided by their std); an only answer
    has no group to compare with and keeps its reward."""
    group = torch.tensor([7, 2, 7, -1, 2, 7])
    rewards = torch.rand(6, generator=rng)
    expected = rewards.double().numpy()
    if baseline == "group":
        means = {g: expected[group.numpy() == g].mean() for g in (7, 2)}
        expected = expected - [means.get(g, 0.0) for g in group.tolist()]
    np.testing.assert_allclose(ReinforcePP(baseline=baseline).credit(rewards, group), expected, rtol=1e-12, atol=1e-15)
