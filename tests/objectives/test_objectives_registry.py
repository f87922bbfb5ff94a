"""Building objectives from settings, and what they refuse."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from numpy_oracles import values_of

from flowrl_mega.config import ConfigError
from flowrl_mega.objectives import GRPO, GSPO, PPO, REGISTRY, FlowRL, ReinforcePP, build


def test_defaults_are_the_papers():
    """A run that names nothing is the published one."""
    assert build({"name": "flowrl"}) == FlowRL(
        beta=15, z="mlp", weight="paper", eps=0.2, length_norm=True, reward_norm="group"
    )
    assert build({"name": "grpo"}) == GRPO(
        clip_eps=0.2, clip_eps_high=None, kl_coef=0, kl_estimator="k3", std=True, loss_mean="sequence"
    )
    assert build({"name": "gspo"}) == GSPO(clip_eps=3e-4, clip_eps_high=4e-4, std=True)
    assert build({"name": "ppo"}) == PPO(
        clip_eps=0.2, value_clip=0.2, gamma=1, lam=1, normalise=True, kl_in="reward", kl_estimator="k1", kl_coef=0
    )
    assert build({"name": "reinforce_pp"}) == ReinforcePP(kl_estimator="k1", baseline="none", loss_mean="token")


@pytest.mark.parametrize("name", REGISTRY)
def test_every_objective_does_what_the_trainer_asks(name, packed, rng):
    """The trainer knows only this surface, so a new registry line is covered from its first day."""
    objective = build({"name": name})
    assert objective.name == name
    s = packed(log_z=bool(objective.log_z and objective.log_z.learned), reference=objective.needs_reference)
    group = torch.tensor([0, 0, 1, 1, 1])
    s = replace(s, credit=objective.credit(s.credit, group), group=group, value=torch.zeros_like(s.old_logp))
    (prepared,) = objective.prepare([replace(s, logp=s.old_logp)], sum_over_replicas=lambda x: x, groups=2)
    s = replace(s, prepared=prepared)
    out = objective.loss(s)
    assert out.loss_sum.dim() == 0 and out.count in (5, s.logp.numel())
    assert all(values_of(metric).shape[-1] == 5 for metric in out.metrics.values())
    assert all("/" in metric for metric in out.metrics), "wandb groups by prefix"
    assert objective.adapted({name: float(values_of(m).mean()) for name, m in out.metrics.items()}, 5) == objective
    out.loss_sum.backward()
    assert s.logp.grad.isfinite().all()


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({}, ["objective.name", "missing", "flowrl", "grpo"]),
        (None, ["objective.name", "missing"]),
        ({"name": "flwrl"}, ["objective.name", "'flwrl'", "did you mean 'flowrl'"]),
        ({"name": "GRPO"}, ["'GRPO'", "did you mean 'grpo'"]),
        ({"name": ["grpo"]}, ["objective.name", "flowrl, grpo"]),
        ({"name": "flowrl", "betta": 3}, ["objective.betta", "beta"]),
        ({"name": "flowrl", "beta": -1}, ["objective.beta", "-1"]),
        ({"name": "flowrl", "beta": float("inf")}, ["objective.beta", "inf"]),
        ({"name": "flowrl", "weight": "clip"}, ["objective.weight", "clip", "paper", "max10", "none"]),
        ({"name": "flowrl", "eps": 1.0}, ["objective.eps", "1.0"]),
        ({"name": "flowrl", "kl_coef": 0.1}, ["objective.kl_coef"]),
        ({"name": "flowrl", "weight": "tis"}, ["objective.weight", "tis", "released", "asym", "gspo"]),
        ({"name": "flowrl", "eps_high": -0.1}, ["objective.eps_high", "-0.1"]),
        ({"name": "flowrl", "z": "none"}, ["objective.z", "none", "mlp-detached", "zero", "constant", "group"]),
        ({"name": "flowrl", "z_prompt": "last"}, ["objective.z_prompt", "last", "drop-last"]),
        ({"name": "flowrl", "z_dropout": 1.0}, ["objective.z_dropout", "1.0"]),
        ({"name": "flowrl", "z": "zero", "z_dropout": 0.1}, ["objective.z_dropout = 0.1", "objective.z = mlp"]),
        (
            {"name": "flowrl", "z": "group", "z_prompt": "drop-last"},
            ["objective.z_prompt = 'drop-last'", "objective.z = mlp"],
        ),
        ({"name": "flowrl", "z_leave_one_out": True}, ["objective.z_leave_one_out = True", "objective.z = group"]),
        ({"name": "flowrl", "z_answers": 4}, ["objective.z_answers = 4", "objective.z = frozen"]),
        (
            {"name": "flowrl", "z": "frozen"},
            ["z = frozen", "reward_norm = group (r_hat)", "objective.reward_norm=none"],
        ),
        (
            {"name": "flowrl", "z": "frozen", "reward_norm": "none", "reference": "old"},
            ["z = frozen", "reference = old", "set objective.reference=frozen, or objective.z=group"],
        ),
        (
            {"name": "flowrl", "z": "frozen", "reward_norm": "none", "z_answers": 0},
            ["objective.z_answers = 0", "greater than or equal to 1"],
        ),
        ({"name": "flowrl", "tis_cap": 3}, ["objective.tis_cap = 3.0", "is read with objective.tis only"]),
        ({"name": "flowrl", "weight": "max10", "eps": 0.1}, ["objective.eps = 0.1", "objective.weight = paper, asym"]),
        ({"name": "flowrl", "eps_high": 0.1}, ["objective.eps_high = 0.1", "objective.weight = asym, cap or gspo"]),
        ({"name": "flowrl", "old": "decoupled"}, ["objective", "old = decoupled", "set objective.tis"]),
        ({"name": "grpo", "old": "behaviour", "tis": "token"}, ["old = behaviour", "set objective.old=decoupled"]),
        ({"name": "gflowrl", "z": "mlp"}, ["objective.z: no such setting"]),
        ({"name": "grpo", "tis_cap": 3}, ["objective.tis_cap = 3.0", "objective.tis only"]),
        ({"name": "grpo", "kl_estimator": "k1"}, ["objective.kl_estimator = 'k1'", "objective.kl_coef above 0"]),
        ({"name": "ppo", "kl_horizon": 5}, ["objective.kl_horizon = 5.0", "objective.kl_target", "leave this out"]),
        ({"name": "ppo", "kl_in": "loss"}, ["objective.kl_in = 'loss'", "objective.kl_coef above 0"]),
        ({"name": "flowrl", "reward_norm": "std"}, ["objective.reward_norm", "std", "group", "none"]),
        ({"name": "flowrl", "clip_eps": 0.2}, ["objective.clip_eps"]),
        ({"name": "grpo", "clip_eps": 0}, ["objective.clip_eps", "0"]),
        ({"name": "grpo", "clip_eps_high": 0}, ["objective.clip_eps_high", "0"]),
        ({"name": "grpo", "kl_coef": float("nan")}, ["objective.kl_coef", "nan"]),
        ({"name": "grpo", "kl_estimator": "k4"}, ["objective.kl_estimator", "k4", "k1", "k2", "k3"]),
        ({"name": "grpo", "loss_mean": "answer"}, ["objective.loss_mean", "answer", "sequence", "token"]),
        ({"name": "grpo", "std": "mad"}, ["objective.std", "mad"]),
        ({"name": "gspo", "clip_eps": 1.0}, ["objective.clip_eps", "1.0"]),
        ({"name": "gspo", "clip_eps_high": None}, ["objective.clip_eps_high"]),
        ({"name": "gspo", "kl_coef": 0.1}, ["objective.kl_coef"]),
        ({"name": "gspo", "tis": "token"}, ["objective.tis", "token", "sum"]),
        ({"name": "ppo", "gamma": 1.1}, ["objective.gamma", "1.1"]),
        ({"name": "ppo", "gamma": 0}, ["objective.gamma", "0"]),
        ({"name": "ppo", "lam": -0.1}, ["objective.lam", "-0.1"]),
        ({"name": "ppo", "value_clip": 0}, ["objective.value_clip", "0"]),
        ({"name": "ppo", "kl_in": "both"}, ["objective.kl_in", "both", "reward", "loss"]),
        ({"name": "ppo", "kl_in": "loss", "kl_coef": 0.1}, ["objective.kl_in", "kl_estimator", "k1", "k2", "k3"]),
        ({"name": "ppo", "kl_target": 0}, ["objective.kl_target", "0"]),
        ({"name": "ppo", "kl_target": 0.1}, ["objective.kl_target", "kl_coef"]),
        ({"name": "ppo", "kl_coef": 0.1, "kl_target": 0.1, "kl_horizon": 0}, ["objective.kl_horizon", "0"]),
        ({"name": "ppo", "baseline": "group"}, ["objective.baseline"]),
        ({"name": "ppo", "value_coef": 0.5}, ["objective.value_coef"]),
        ({"name": "reinforce_pp", "baseline": "mean"}, ["objective.baseline", "mean", "none", "group"]),
        ({"name": "reinforce_pp", "gamma": 0.9}, ["objective.gamma"]),
        ({"name": "reinforce_pp", "kl_coef": -0.1}, ["objective.kl_coef", "-0.1"]),
        ({"name": "reinforce++"}, ["objective.name", "'reinforce++'", "did you mean 'reinforce_pp'"]),
        ({"name": "PPO"}, ["objective.name", "did you mean 'ppo'"]),
    ],
)
def test_wrong_settings_name_the_field_and_the_fix(section, words):
    """A typing mistake must end before a GPU is asked for, with a message that says what to change."""
    with pytest.raises(ConfigError) as error:
        build(section)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("name", REGISTRY)
def test_a_default_that_nothing_reads_is_no_choice(name):
    """A section with every field written out, as a person may copy it from a table."""
    assert build(build({"name": name}).model_dump()) == build({"name": name})


def test_reference_and_partition_function_follow_the_settings():
    """The trainer loads a reference and builds Z_phi by these two alone: a wrong answer costs memory or a crash."""
    assert FlowRL().needs_reference and FlowRL().log_z.kind == "mlp"
    assert not FlowRL(z="zero").log_z.learned and FlowRL(z="constant").log_z.kind == "constant"
    assert not GRPO().needs_reference and GRPO(kl_coef=0.1).needs_reference and GRPO().log_z is None


def test_inputs_that_do_not_fit_are_refused(packed):
    """Each of these would otherwise broadcast, divide by zero or train without a term, in silence."""
    s = packed()
    with pytest.raises(AssertionError, match="at least one token"):
        replace(s, cu_seqlens=s.cu_seqlens.clone().index_fill_(0, s.cu_seqlens.new_tensor([1]), 0))
    with pytest.raises(AssertionError, match="cu_seqlens spans"):
        replace(s, cu_seqlens=s.cu_seqlens + (s.cu_seqlens > 10))
    with pytest.raises(AssertionError, match="old_logp"):
        replace(s, old_logp=s.old_logp[:1])
    with pytest.raises(AssertionError, match="log_z is not"):
        replace(s, log_z=s.log_z[:1])
    with pytest.raises(AssertionError, match="FlowRL needs"):
        FlowRL().loss(replace(s, ref_logp=None))
    with pytest.raises(AssertionError, match="z=mlp"):
        FlowRL().loss(replace(s, log_z=None))
    with pytest.raises(AssertionError, match="z=zero"):
        FlowRL(z="zero").loss(s)
    with pytest.raises(AssertionError, match="grpo with kl_coef"):
        GRPO(kl_coef=0.1).loss(replace(s, ref_logp=None))
