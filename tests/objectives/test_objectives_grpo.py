"""GRPO against its papers' equations in NumPy: every advantage, mean, clip and KL estimator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_loss, policy_gradient
from torch.autograd import grad, gradcheck

from flowrl_mega.objectives import GRPO
from flowrl_mega.objectives.policy_gradient import clipped_surrogate, kl_estimate

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)


@pytest.mark.parametrize("loss_mean", ["sequence", "token"])
@pytest.mark.parametrize("high", [None, 0.28, 2.0])
@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
def test_grpo_equals_numpy(packed, kl_coef, estimator, high, loss_mean):
    """The paper's sequence mean of token means (long answers do not outvote short ones) and DAPO's mean over tokens
    (they do), both clip bounds, and each KL estimator."""
    objective = GRPO(clip_eps=0.2, clip_eps_high=high, kl_coef=kl_coef, kl_estimator=estimator, loss_mean=loss_mean)
    s = packed(drift=0.6, lengths=LENGTHS, log_z=False, reference=kl_coef > 0)
    advantage = [np.full(n, a) for n, a in zip(LENGTHS, s.credit.tolist(), strict=True)]
    expected = policy_gradient(s, advantage, objective, kl_in_loss=True)
    out = objective.loss(s)
    assert out.count == (sum(LENGTHS) if loss_mean == "token" else len(LENGTHS))
    assert 0 < expected[2]["policy/clip_fraction"].mean() < 1
    assert_loss(out, s, *expected)


def test_advantage_without_std(rng):
    """Dr. GRPO (arXiv 2503.20783): the reward above its group's mean, so that hard and easy prompts, whose std is
    small, do not count more."""
    group = torch.tensor([7, 2, 7, -1, 2, 7])
    rewards = torch.rand(6, generator=rng)
    means = {g: rewards[group == g].double().mean().item() for g in (7, 2)}
    expected = [r - means.get(g, 0.0) for r, g in zip(rewards.double().tolist(), group.tolist(), strict=True)]
    np.testing.assert_allclose(GRPO(std=False).credit(rewards, group), expected, rtol=1e-12, atol=1e-15)


def test_clip_bounds_by_hand():
    """The four corners: the clip only stops a token from going further the way its advantage pushes."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5], dtype=torch.float64)
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0], dtype=torch.float64)
    log_ratio = ratio.log().requires_grad_()
    terms = clipped_surrogate(log_ratio, advantage, 0.2, 0.28)
    torch.testing.assert_close(terms.loss, torch.tensor([-1.28, 1.5, -0.5, 0.8], dtype=torch.float64))
    assert terms.clipped.tolist() == [1, 0, 0, 1]
    gradient = grad(terms.loss.sum(), log_ratio)[0]
    torch.testing.assert_close(gradient, torch.tensor([0.0, 1.5, -0.5, 0.0], dtype=torch.float64))


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_k1_and_k3_are_unbiased(strings, logits, ref, estimator):
    """Their mean over a distribution is the KL to the reference, and no sample of k3 is negative."""
    log_p, log_q = logits.detach().log_softmax(-1), ref.log_softmax(-1)
    estimate = kl_estimate(log_p, log_q, estimator)
    assert estimator == "k1" or (estimate >= 0).all()
    torch.testing.assert_close((log_p.exp() * estimate).sum(-1), (log_p.exp() * (log_p - log_q)).sum(-1))


def test_gradients_of_the_estimators(logits, ref):
    """What a loss with each of them pulls at, on average over what the policy draws: with k2 the KL to the reference,
    with k1 nothing at all, with k3 the KL of the reference to the policy, the other way round."""
    log_p, log_q = logits.log_softmax(-1), ref.log_softmax(-1)
    pull = {
        k: grad((log_p.exp().detach() * kl_estimate(log_p, log_q, k)).sum(), logits, retain_graph=True)[0]
        for k in ("k1", "k2", "k3")
    }
    forward = grad((log_p.exp() * (log_p - log_q)).sum(), logits, retain_graph=True)[0]
    reverse = grad((log_q.exp() * (log_q - log_p)).sum(), logits, retain_graph=True)[0]
    assert (forward - reverse).norm() > 0.1 * forward.norm(), "the two must differ here, or the test says nothing"
    torch.testing.assert_close(pull["k1"], torch.zeros_like(logits))
    torch.testing.assert_close(pull["k2"], forward)
    torch.testing.assert_close(pull["k3"], reverse)


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3"])
def test_gradient_by_finite_differences(packed, estimator):
    """Autograd against differences of the loss itself."""
    s = packed(log_z=False)
    objective = GRPO(kl_coef=0.1, kl_estimator=estimator, loss_mean="token")
    assert gradcheck(lambda p: objective.loss(replace(s, logp=p)).loss_sum, (s.logp,))
