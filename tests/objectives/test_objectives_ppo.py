"""PPO against its papers' equations in NumPy: advantages, both losses, the KL in either place, and its controller."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_loss, assert_metrics, kl, normalised, policy_gradient, split
from torch.autograd import gradcheck

from flowrl_mega.objectives import PPO
from flowrl_mega.objectives.gae import gae

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)


@pytest.fixture
def scored(packed, rng):
    """A micro-batch that the critic has looked at."""

    def make(lengths=LENGTHS, **how):
        s = packed(lengths=lengths, log_z=False, **how)
        return replace(s, value=torch.randn(sum(lengths), generator=rng, dtype=torch.float64))

    return make


def gae_numpy(rewards, values, gamma, lam):
    """A_t = sum_l (gamma lam)^l delta_{t + l}, delta_t = r_t + gamma V_{t + 1} - V_t: the sum itself, not a recursion.
    Source: arXiv 1506.02438, Eq. 11 and 16, with nothing after the last token."""
    delta = [r + gamma * after - v for r, v, after in zip(rewards, values, [*values[1:], 0.0], strict=True)]
    return np.array([sum((gamma * lam) ** k * d for k, d in enumerate(delta[t:])) for t in range(len(delta))])


def ppo_numpy(s, o):
    """Advantages before they are normalised, and returns, one array a sequence each."""
    advantage, returns = [], []
    refs = split(s, s.ref_logp) if o.kl_coef else split(s, s.old_logp)
    rows = zip(split(s, s.old_logp), refs, split(s, s.value), s.credit.tolist(), strict=True)
    for old, ref, value, credit in rows:
        coef = o.kl_coef if o.kl_in == "reward" else 0.0
        reward = np.array([-coef * kl(*token, o.kl_estimator)[0] for token in zip(old, ref, strict=True)])
        reward[-1] += credit
        advantage.append(gae_numpy(reward, value, o.gamma, o.lam))
        returns.append(advantage[-1] + value)
    return advantage, returns


def prepared(objective, s):
    """The micro-batch as the update gets it, of a step that is this micro-batch alone."""
    return replace(s, prepared=objective.prepare([s], lambda x: x, len(s.credit))[0])


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.5, 1.0)])
def test_gae_is_the_sum_of_its_definition(scored, rng, gamma, lam):
    """Sequences of unequal lengths share one pass from their ends: none may see another's value."""
    s = scored()
    reward = torch.randn(sum(LENGTHS), generator=rng, dtype=torch.float64)
    advantage = gae(reward, s.value, s.cu_seqlens, gamma, lam)
    expected = [gae_numpy(r, v, gamma, lam) for r, v in zip(split(s, reward), split(s, s.value), strict=True)]
    np.testing.assert_allclose(advantage, np.concatenate(expected), rtol=1e-12, atol=1e-14)


def test_with_lambda_one_the_returns_are_the_reward(scored):
    """gamma = lam = 1 telescopes: whatever the critic says, its target is the answer's reward, and the advantage
    what the reward is above the value."""
    s = scored()
    s = prepared(PPO(normalise=False), s)
    torch.testing.assert_close(s.prepared["returns"], s.per_token(s.credit))
    torch.testing.assert_close(s.prepared["advantage"], s.per_token(s.credit) - s.value)


@pytest.mark.parametrize("normalise", [True, False])
@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize(
    ("kl_coef", "kl_in", "estimator"),
    [(0.0, "reward", "k1"), (0.3, "reward", "k1"), (0.3, "reward", "k3"), (0.3, "loss", "k2"), (0.3, "loss", "k3")],
)
def test_policy_loss_equals_numpy(scored, kl_coef, kl_in, estimator, loss_mean, normalise):
    """From rewards, values and log-probs to the loss, its gradient and its metrics. The KL in the reward is that of
    pi_old and has no gradient; in the loss it is that of pi_theta."""
    objective = PPO(
        gamma=0.97,
        lam=0.9,
        clip_eps_high=0.3,
        kl_coef=kl_coef,
        kl_in=kl_in,
        kl_estimator=estimator,
        loss_mean=loss_mean,
        normalise=normalise,
    )
    s = prepared(objective, scored(drift=0.6, reference=kl_coef > 0))
    advantage, _ = ppo_numpy(s, objective)
    advantage = normalised(advantage) if normalise else advantage
    expected = policy_gradient(s, advantage, objective, kl_in_loss=kl_in == "loss")
    out = objective.loss(s)
    assert out.count == (sum(LENGTHS) if loss_mean == "token" else len(LENGTHS))
    assert 0 < expected[2]["policy/clip_fraction"].mean() < 1
    assert_loss(out, s, *expected)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("clip", [0.2, None])
def test_value_loss_equals_numpy(scored, rng, clip, loss_mean):
    """1/2 max((V - R)^2, (clip(V, V_old +- c) - R)^2): a value that ran further than c towards its target teaches
    nothing more; one that ran away from it is pulled back. Source: the authors' code of arXiv 1707.06347."""
    objective = PPO(value_clip=clip, lam=0.9, loss_mean=loss_mean)
    s = prepared(objective, scored())
    value = (s.value + 0.4 * torch.randn(sum(LENGTHS), generator=rng, dtype=torch.float64)).requires_grad_()
    _, returns = ppo_numpy(s, objective)
    loss, gradient, metrics = 0.0, [], []
    for new, old, target in zip(split(s, value), split(s, s.value), returns, strict=True):
        weight = 1 / sum(LENGTHS) if loss_mean == "token" else 1 / (len(LENGTHS) * len(new))
        stopped = []
        for v, v_old, r in zip(new, old, target, strict=True):
            bound = v if clip is None else v_old + np.sign(v - v_old) * min(abs(v - v_old), clip)
            stopped.append((bound - r) ** 2 > (v - r) ** 2)
            loss += weight * max((bound - r) ** 2, (v - r) ** 2) / 2
            gradient.append(0.0 if stopped[-1] else weight * (v - r))
        error = target - new
        sizes = (target**2).mean(), error.mean(), (error**2).mean()
        metrics.append((new.mean(), np.mean(stopped), target.mean(), *sizes))
    values, clipped, *moments = np.array(metrics).T
    metrics = {"critic/value": values, "critic/return": moments[0], "critic/value_clip_fraction": clipped}
    metrics["critic/explained_variance"] = moments
    assert clip is None or 0 < clipped.mean() < 1
    out = objective.value_loss(value, s)
    (out.loss_sum / out.count).backward()
    np.testing.assert_allclose(out.loss_sum.item() / out.count, loss, rtol=1e-12)
    np.testing.assert_allclose(value.grad, gradient, rtol=1e-12, atol=1e-15)
    assert_metrics(out, metrics)


def test_gradients_by_finite_differences(scored):
    """Autograd of both losses against differences of the losses themselves."""
    objective = PPO(kl_coef=0.2, kl_in="loss", kl_estimator="k3")
    s = prepared(objective, scored())
    value = (s.value + 0.1).requires_grad_()
    assert gradcheck(lambda p: objective.loss(replace(s, logp=p)).loss_sum, (s.logp,))
    assert gradcheck(lambda v: objective.value_loss(v, s).loss_sum, (value,))


@pytest.mark.parametrize(("kl_now", "change"), [(0.05, -0.2), (0.09, -0.1), (0.1, 0.0), (0.11, 0.1), (9.0, 0.2)])
def test_controller_of_ziegler(kl_now, change):
    """beta <- beta (1 + e n / horizon), e = clip(KL / target - 1, -0.2, 0.2): up when the policy is further away than
    wished, by at most a fifth. Source: arXiv 1909.08593, section 2.2, and the authors' code for n / horizon."""
    objective = PPO(kl_coef=0.3, kl_target=0.1, kl_horizon=1000)
    after = objective.adapted({"policy/kl_to_ref": kl_now}, 64)
    assert after.kl_coef == pytest.approx(0.3 * (1 + change * 64 / 1000), rel=1e-12)
    assert after.model_copy(update={"kl_coef": 0.3}) == objective


def test_a_horizon_shorter_than_a_step_cannot_turn_the_kl_around():
    """1 - 0.2 n / horizon is negative where n > 5 horizon: training would then flee the reference."""
    objective = PPO(kl_coef=0.3, kl_target=0.1, kl_horizon=100)
    assert objective.adapted({"policy/kl_to_ref": 0.01}, 4096).kl_coef == pytest.approx(0.3 * 0.8)


def test_without_a_target_the_coefficient_stays():
    """A fixed coefficient is the default, and must stay one whatever the KL does."""
    objective = PPO(kl_coef=0.3)
    assert objective.adapted({"policy/kl_to_ref": 99.0}, 64) == objective


def test_controller_reaches_its_target():
    """In a closed loop where the KL falls as the coefficient rises, the KL ends where the user wants it."""
    objective = PPO(kl_coef=0.01, kl_target=0.05, kl_horizon=640)
    for _ in range(1000):
        distance = 0.01 / objective.kl_coef
        objective = objective.adapted({"policy/kl_to_ref": distance}, 64)
    assert distance == pytest.approx(0.05, rel=1e-3)
