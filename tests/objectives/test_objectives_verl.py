"""PPO, GRPO, GSPO and REINFORCE++ against verl's own functions on the same tensors, in float64.

verl keeps answers as rows [B, L] with a mask, we pack them. Where its definitions are others than ours, the test says
so and sets verl's so that both can agree.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import replace
from importlib.machinery import ModuleSpec
from types import ModuleType

import pytest
import torch
from torch.autograd import grad
from torch.nn.utils.rnn import pad_sequence

from flowrl_mega.objectives import GRPO, GSPO, PPO, ReinforcePP

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
GROUP = torch.tensor([4, 4, 0, 7, 0, 4, 0, 4])  # unequal, interleaved, and one answer alone
MEANS = {"sequence": "seq-mean-token-mean", "token": "token-mean"}
EXACT = {"rtol": 1e-12, "atol": 1e-14}
WHITENED = {"rtol": 1e-8, "atol": 1e-8}  # verl adds 1e-8 to the number of tokens
ALONE = {"rtol": 1e-7, "atol": 0.0}  # verl divides a group of one by 1 + 1e-6 in float32


@pytest.fixture(scope="module")
def verl() -> ModuleType:
    """verl.trainer.ppo.core_algos. verl cannot start without ray, 70 MB of which these functions use nothing: an empty
    module stands in for it while verl is imported."""
    ray = ModuleType("ray")
    ray.__spec__, ray.ObjectRef = ModuleSpec("ray", None), object
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "ray", ray)
        return importlib.import_module("verl.trainer.ppo.core_algos")


@pytest.fixture
def scored(packed, rng):
    """A micro-batch with groups, values and no log Z."""

    def make(**how):
        s = packed(lengths=LENGTHS, log_z=False, **how)
        return replace(s, group=GROUP, value=torch.randn(sum(LENGTHS), generator=rng, dtype=torch.float64))

    return make


def pad(s, values):
    """[T] -> [B, L], zeros after each answer."""
    return pad_sequence(values.split(s.length.tolist()), batch_first=True)


def mask_of(s):
    """[B, L] int64, as verl has it."""
    return pad(s, torch.ones(s.logp.numel(), dtype=torch.int64))


def pack(s, rows):
    """[B, L] -> [T]."""
    return rows[mask_of(s).bool()]


def outcome(s):
    """Each answer's credit at its last token, [B, L]."""
    rewards = torch.zeros(s.logp.numel(), dtype=torch.float64)
    rewards[s.cu_seqlens[1:] - 1] = s.credit
    return pad(s, rewards)


def actor(objective):
    """verl's settings of the same loss. Its clip has a third bound, on ratios of tokens with a negative advantage
    ("dual clip"), which none of the papers has: out of reach here."""
    from verl.workers.config import ActorConfig

    high = objective.clip_eps if objective.clip_eps_high is None else objective.clip_eps_high
    clip = {"clip_ratio": objective.clip_eps, "clip_ratio_low": objective.clip_eps, "clip_ratio_high": high}
    return ActorConfig(strategy="fsdp", rollout_n=1, use_dynamic_bsz=True, clip_ratio_c=1e12, **clip)


def policy_loss(verl, objective, s, advantage):
    """verl's mean loss of advantages [B, L], the KL term included where the objective has one in the loss."""
    mask, mean = mask_of(s), MEANS[getattr(objective, "loss_mean", "sequence")]
    form = verl.get_policy_loss_fn("gspo" if isinstance(objective, GSPO) else "vanilla")
    loss, metrics = form(pad(s, s.old_logp), pad(s, s.logp), advantage, mask, mean, actor(objective))
    if getattr(objective, "kl_coef", 0) and getattr(objective, "kl_in", "loss") == "loss":
        kl = verl.kl_penalty(pad(s, s.logp), pad(s, s.ref_logp), objective.kl_estimator)
        loss = loss + objective.kl_coef * verl.agg_loss(kl, mask, mean)
    return loss, metrics


def assert_same(out, s, loss, tolerance=EXACT):
    """Mean loss and its gradient in the log-probs."""
    mean = out.loss_sum / out.count
    torch.testing.assert_close(mean, loss, **tolerance)
    torch.testing.assert_close(grad(mean, s.logp)[0], grad(loss, s.logp)[0], **tolerance)


@pytest.mark.parametrize("std", [True, False])
@pytest.mark.parametrize("loss_mean", ["sequence", "token"])
@pytest.mark.parametrize(("kl_coef", "estimator"), [(0.0, "k3"), (0.3, "k1"), (0.3, "k2"), (0.3, "k3")])
def test_grpo(verl, scored, kl_coef, estimator, loss_mean, std):
    """From rewards to loss and gradient: group statistics, asymmetric clip, KL term and both means."""
    objective = GRPO(
        clip_eps=0.2, clip_eps_high=0.28, std=std, loss_mean=loss_mean, kl_coef=kl_coef, kl_estimator=estimator
    )
    s = scored(drift=0.6)
    advantage, _ = verl.compute_grpo_outcome_advantage(
        outcome(s), mask_of(s), GROUP.numpy(), norm_adv_by_std_in_grpo=std
    )
    s = replace(s, credit=objective.credit(s.credit, GROUP))
    torch.testing.assert_close(s.per_token(s.credit), pack(s, advantage), **(ALONE if std else EXACT))
    loss, metrics = policy_loss(verl, objective, s, pad(s, s.per_token(s.credit)))
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9
    assert_same(objective.loss(s), s, loss)


@pytest.mark.parametrize(("drift", "clip"), [(1.5, {"clip_eps": 0.2, "clip_eps_high": 0.28}), (3e-3, {})])
def test_gspo(verl, scored, drift, clip):
    """verl gives each token of an answer the answer's ratio, with a gradient of its own; the sum is the paper's."""
    objective = GSPO(**clip)
    s = scored(drift=drift)
    s = replace(s, credit=objective.credit(s.credit, GROUP))
    loss, metrics = policy_loss(verl, objective, s, pad(s, s.per_token(s.credit)))
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9
    assert_same(objective.loss(s), s, loss)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize(
    ("kl_coef", "kl_in", "estimator"),
    [(0.0, "reward", "k1"), (0.3, "reward", "k1"), (0.3, "reward", "k3"), (0.3, "loss", "k2"), (0.3, "loss", "k3")],
)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8)])
def test_ppo(verl, scored, gamma, lam, kl_coef, kl_in, estimator, loss_mean):
    """From rewards and values to advantages, returns, loss and gradient. verl always whitens the advantages, over the
    tokens of the batch that it is given; here that is the step."""
    how = {"kl_coef": kl_coef, "kl_in": kl_in, "kl_estimator": estimator, "loss_mean": loss_mean}
    objective = PPO(gamma=gamma, lam=lam, **how)
    s = scored(drift=0.6)
    rewards = outcome(s)
    if kl_coef and kl_in == "reward":
        rewards = rewards - kl_coef * verl.kl_penalty(pad(s, s.old_logp), pad(s, s.ref_logp), estimator)
    advantage, returns = verl.compute_gae_advantage_return(rewards, pad(s, s.value), mask_of(s).double(), gamma, lam)
    s = replace(s, prepared=objective.prepare([s], lambda x: x, 8)[0])
    torch.testing.assert_close(s.prepared["returns"], pack(s, returns), **EXACT)
    torch.testing.assert_close(s.prepared["advantage"], pack(s, advantage), **WHITENED)
    loss, metrics = policy_loss(verl, objective, s, pad(s, s.prepared["advantage"]))
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9
    assert_same(objective.loss(s), s, loss)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
def test_value_loss(verl, scored, rng, loss_mean):
    """The clipped loss of the critic, its half included."""
    objective = PPO(lam=0.9, value_clip=0.2, loss_mean=loss_mean)
    s = scored()
    s = replace(s, prepared=objective.prepare([s], lambda x: x, 8)[0])
    value = (s.value + 0.4 * torch.randn(sum(LENGTHS), generator=rng, dtype=torch.float64)).requires_grad_()
    rows = (pad(s, x) for x in (value, s.prepared["returns"], s.value))
    loss, clipped = verl.compute_value_loss(*rows, mask_of(s), 0.2, MEANS[loss_mean])
    out = objective.value_loss(value, s)
    mean = out.loss_sum / out.count
    torch.testing.assert_close(mean, loss, **EXACT)
    torch.testing.assert_close(grad(mean, value)[0], grad(loss, value)[0], **EXACT)
    by_token = (out.metrics["critic/value_clip_fraction"].values * s.length).sum() / sum(LENGTHS)
    assert 0 < by_token < 1 and by_token.item() == pytest.approx(clipped.item(), abs=1e-6)


@pytest.mark.parametrize("kl", [0.01, 0.095, 0.1, 0.104, 2.0])
def test_adaptive_controller(verl, kl):
    """A few steps of it, from both sides of the target, within and beyond the bound of a step."""
    controller = verl.AdaptiveKLController(0.3, target_kl=0.1, horizon=1000)
    objective = PPO(kl_coef=0.3, kl_target=0.1, kl_horizon=1000)
    for sequences in (64, 8, 512):
        controller.update(kl, sequences)
        objective = objective.adapted({"policy/kl_to_ref": kl}, sequences)
        assert objective.kl_coef == pytest.approx(controller.value, rel=1e-12)


@pytest.mark.parametrize("loss_mean", ["token", "sequence"])
@pytest.mark.parametrize("kl_coef", [0.0, 0.3])
def test_reinforce_pp(verl, scored, kl_coef, loss_mean):
    """The KL of every token in the reward, rewards to go, normalised over tokens, then the clipped loss."""
    from verl.trainer.config import AlgoConfig

    objective = ReinforcePP(kl_coef=kl_coef, loss_mean=loss_mean)
    s = scored(drift=0.6)
    rewards = verl.compute_rewards(outcome(s), pad(s, s.old_logp), pad(s, s.ref_logp), kl_coef)
    advantage, _ = verl.compute_reinforce_plus_plus_outcome_advantage(
        rewards, mask_of(s).double(), config=AlgoConfig(gamma=1.0)
    )
    s = replace(s, prepared=objective.prepare([s], lambda x: x, 8)[0])
    torch.testing.assert_close(s.prepared["advantage"], pack(s, advantage), **WHITENED)
    in_loss = objective.model_copy(update={"kl_coef": 0.0})
    loss, metrics = policy_loss(verl, in_loss, s, pad(s, s.prepared["advantage"]))
    assert 0.1 < metrics["actor/pg_clipfrac"] < 0.9
    assert_same(objective.loss(s), s, loss)


def test_reinforce_pp_with_a_baseline(verl, scored):
    """The group's mean off the reward first. verl's form of it has no KL of tokens, so none is compared."""
    objective = ReinforcePP(baseline="group")
    s = scored()
    mask = mask_of(s).double()
    advantage, _ = verl.compute_reinforce_plus_plus_baseline_outcome_advantage(outcome(s), mask, GROUP.numpy())
    s = replace(s, credit=objective.credit(s.credit, GROUP))
    torch.testing.assert_close(objective.prepare([s], lambda x: x, 8)[0]["advantage"], pack(s, advantage), **WHITENED)
