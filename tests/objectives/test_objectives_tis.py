"""What the engine's own log-probs change: truncated importance sampling, and the metrics of the mismatch."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from numpy_oracles import values_of
from torch.autograd import grad

import flowrl_mega.parallel  # noqa: F401  # before megatron
from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.experience import Experience, credited
from flowrl_mega.objectives import GRPO, FlowRL, build
from flowrl_mega.objectives.base import mismatch_metrics
from flowrl_mega.objectives.flowrl import flowrl_loss
from flowrl_mega.rewards.load import Score
from flowrl_mega.rollout import Rollout

DRIFTS = [0.0, 1e-5, 1e-2, 1.0]
LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
EVERY_TIS = [
    *[(FlowRL(beta=3.0, tis=tis, tis_cap=cap), tis) for tis, cap in [("none", 2.0), ("sum", 1.5), ("mean", 1.1)]],
    (FlowRL(z="zero", length_norm=False, weight="max10", tis="sum", tis_cap=0.7), "sum-of-sums"),
    *[(GRPO(kl_coef=0.3, tis=tis, tis_cap=cap), tis) for tis, cap in [("none", 2.0), ("sum", 1.5), ("mean", 1.1)]],
    (GRPO(kl_coef=0.3, tis="token", tis_cap=1.3), "token"),
]
each_objective = pytest.mark.parametrize(
    "objective", [o for o, _ in EVERY_TIS], ids=[f"{o.name}-{tis}" for o, tis in EVERY_TIS]
)


def from_engine(s, drift, rng):
    """The batch with the log-probs of an engine whose tokens' are off by `drift` nats."""
    return replace(s, rollout_logp=s.old_logp + drift * torch.randn(len(s.logp), generator=rng, dtype=torch.float64))


def micro_batch(packed, objective, drift, rng, **choices):
    s = packed(lengths=LENGTHS, log_z=bool(objective.log_z and objective.log_z.learned), **choices)
    return from_engine(s, drift, rng)


def in_numpy(s, o):
    """Loss, d loss / d logp [T], and the metrics that the engine's log-probs add, written from the definitions."""
    loss, d_logp, metrics = 0.0, [], []
    arrays = [x.detach().numpy() for x in (s.logp, s.old_logp, s.ref_logp, s.rollout_logp)]
    log_z = np.zeros(len(s.credit)) if s.log_z is None else s.log_z.detach().numpy()
    for (a, b), z, credit in zip(pairwise(s.cu_seqlens.tolist()), log_z, s.credit.numpy(), strict=True):
        logp, old, ref, rollout = (x[a:b] for x in arrays)
        x = old - rollout
        ratio = {"none": [1.0], "sum": [np.exp(x.sum())], "mean": [np.exp(x.mean())], "token": np.exp(x)}[o.tis]
        tis = np.minimum(ratio, o.tis_cap if o.tis != "none" else 1.0)
        m = {} if o.tis == "none" else {"tis_weight": tis.mean(), "tis_clipped": np.mean(tis != ratio)}
        m |= {"abs_logp_diff": abs(x).mean(), "max_abs_logp_diff": abs(x).max(), "abs_sum_logp_diff": abs(x.sum())}
        m["effective_sample_size"] = np.exp(x.sum()), np.exp(x.sum()) ** 2
        m["kl"] = sum((x**k).mean() / math.factorial(k) for k in range(2, 60))  # e^x - 1 - x, its series
        n = len(logp)
        if o.name == "flowrl":
            scale = n if o.length_norm else 1
            low, high = (1 - o.eps, 1 + o.eps) if o.weight == "paper" else (0, 10)
            w = np.clip(np.exp((logp - old).sum()), low, high)
            delta = z + logp.sum() / scale - o.beta * credit - ref.sum() / scale
            engine_delta = z + (logp.sum() - old.sum() + rollout.sum()) / scale - o.beta * credit - ref.sum() / scale
            m["residual_sq_change"] = engine_delta**2 - delta**2
            loss += tis[0] * w * delta**2
            d_logp += [2 * tis[0] * w * delta / scale] * n
        else:
            rho, to_ref = np.exp(logp - old), ref - logp
            surrogate = -np.minimum(rho * credit, np.clip(rho, 1 - o.clip_eps, 1 + o.clip_eps) * credit)
            free = surrogate == -rho * credit
            loss += (tis * surrogate + o.kl_coef * (np.exp(to_ref) - to_ref - 1)).mean()
            d_logp += ((-tis * free * rho * credit + o.kl_coef * (1 - np.exp(to_ref))) / n).tolist()
        metrics.append(m)
    return loss, np.array(d_logp), {f"mismatch/{name}": np.array([m[name] for m in metrics]).T for name in metrics[0]}


@pytest.mark.parametrize("drift", DRIFTS)
@each_objective
def test_loss_gradient_and_metrics_equal_numpy(packed, rng, objective, drift):
    """Every choice at every size of drift: a wrong sign, sum for mean, or a term weighted that should not be."""
    s = micro_batch(packed, objective, drift, rng)
    out = objective.loss(s)
    loss, d_logp, metrics = in_numpy(s, objective)
    np.testing.assert_allclose(out.loss_sum.item(), loss, rtol=1e-12)
    np.testing.assert_allclose(grad(out.loss_sum, s.logp)[0], d_logp, rtol=1e-12, atol=1e-15)
    plain = objective.model_copy(update={"tis": "none"}).loss(replace(s, rollout_logp=None))
    assert out.metrics.keys() - plain.metrics.keys() == metrics.keys()
    for name, expected in metrics.items():
        rtol = 1e-9 if name == "mismatch/kl" else 1e-12  # e^x - 1 - x cancels
        atol = 1e-11 if name == "mismatch/residual_sq_change" else 0.0  # so does the oracle's difference of squares
        np.testing.assert_allclose(values_of(out.metrics[name]), expected, rtol=rtol, atol=atol, err_msg=name)
    if drift == 1.0 and objective.tis != "none":
        assert 0 < metrics["mismatch/tis_clipped"].mean() < 1, "both sides of the cap must be in the batch"


@each_objective
def test_an_engine_that_agrees_changes_nothing(packed, rng, objective):
    """Weight 1 and the same loss and gradient to the last bit: with the embedded engine tis is free of charge."""
    s = micro_batch(packed, objective, 0.0, rng)
    objective = objective.model_copy(update={"tis_cap": 1.0})
    out, plain = objective.loss(s), objective.model_copy(update={"tis": "none"}).loss(replace(s, rollout_logp=None))
    assert torch.equal(out.loss_sum, plain.loss_sum)
    assert torch.equal(grad(out.loss_sum, s.logp)[0], grad(plain.loss_sum, s.logp)[0])
    found = {name: values_of(metric) for name, metric in out.metrics.items()}
    assert (found["mismatch/effective_sample_size"] == 1).all() and (found["mismatch/kl"] == 0).all()
    if objective.tis != "none":
        assert (found["mismatch/tis_weight"] == 1).all() and (found["mismatch/tis_clipped"] == 0).all()
    for name, metric in plain.metrics.items():
        assert np.array_equal(found[name], values_of(metric)), name


@each_objective
def test_without_tis_the_engine_is_only_watched(packed, rng, objective):
    """Measuring the mismatch must not train on it, and without an engine's log-probs nothing about it is logged."""
    objective = objective.model_copy(update={"tis": "none"})
    s = micro_batch(packed, objective, 1.0, rng)
    watched, plain = objective.loss(s), objective.loss(replace(s, rollout_logp=None))
    assert torch.equal(watched.loss_sum, plain.loss_sum)
    assert not {name for name in plain.metrics if name.startswith("mismatch/")}
    assert mismatch_metrics(s).keys() <= watched.metrics.keys()


@each_objective
def test_the_weight_carries_no_gradient(packed, rng, objective):
    """Neither log-prob in it does, even when it comes from a graph: grad of the weight would move the optimum."""
    s = micro_batch(packed, objective, 0.3, rng)
    old, rollout = s.old_logp.clone().requires_grad_(), s.rollout_logp.clone().requires_grad_()
    weight, metrics = objective.tis_weight(replace(s, old_logp=old, rollout_logp=rollout))
    assert not weight.requires_grad and not any(metric.values.requires_grad for metric in metrics.values())
    out = objective.loss(replace(s, rollout_logp=rollout))
    assert grad(out.loss_sum, rollout, allow_unused=True)[0] is None


@pytest.mark.parametrize("tis", ["sum", "mean", "token"])
def test_the_cap_cuts_from_above_only(packed, tis):
    """An answer that the trainer likes less than the engine did must lose weight, down to nothing; one that it likes
    more gets the cap, also where e^2000 is no number."""
    s = packed(lengths=(1, 1, 1, 1))
    s = replace(s, rollout_logp=s.old_logp - torch.tensor([-2000, -3, math.log(1.9), 2000], dtype=torch.float64))
    weight, metrics = GRPO(tis=tis, tis_cap=2.0).tis_weight(s)
    np.testing.assert_allclose(weight, [0.0, math.exp(-3), 1.9, 2.0], rtol=1e-12)
    assert metrics["mismatch/tis_clipped"].values.tolist() == [0, 0, 0, 1]


def test_weighted_strings_of_the_engine_teach_what_strings_of_the_trainer_would(strings, logits, ref, reward, rng):
    """What importance sampling is for, on every string there is: under a cap that cuts nothing, the engine's
    expectation of the weighted gradient is the trainer's; without the weight it is another one."""
    engine = (ref + 0.3 * torch.randn(strings.shape, generator=rng, dtype=torch.float64)).detach()
    s = replace(strings.sequences(logits, reward, ref), rollout_logp=strings.token_logp(engine))

    def expected_gradient(p, tis):
        weight, _ = FlowRL(tis=tis, tis_cap=1e9).tis_weight(s)
        sums = (strings.logp(logits), strings.logp(ref), torch.zeros_like(p))
        return grad((p * weight * flowrl_loss(0.3, *sums, s.length, reward, beta=2.0).loss).sum(), logits)[0]

    p_trainer, p_engine = strings.logp(logits).exp().detach(), strings.logp(engine).exp()
    wanted = expected_gradient(p_trainer, "none")
    torch.testing.assert_close(expected_gradient(p_engine, "sum"), wanted, rtol=1e-10, atol=1e-13)
    assert (expected_gradient(p_engine, "none") - wanted).norm() > 0.1 * wanted.norm()


def test_mismatch_metrics_are_unbiased(strings, logits, ref):
    """Over the engine's distribution the estimate is KL(engine || trainer), not the other way round, the weights have
    mean 1, and their mean square is that of the exact ratio."""
    trainer, engine = strings.logp(logits.detach()), strings.logp(ref)
    s = strings.sequences(logits, torch.zeros(len(strings)), ref)
    metrics = mismatch_metrics(replace(s, rollout_logp=strings.token_logp(ref)))
    kl = (engine.exp() * (engine - trainer)).sum()
    reverse = (trainer.exp() * (trainer - engine)).sum()
    assert abs(kl - reverse) > 1e-3, "the two directions must differ here, or the test says nothing"
    estimate, (weight, square) = metrics["mismatch/kl"].values, metrics["mismatch/effective_sample_size"].means
    assert (estimate >= 0).all()
    torch.testing.assert_close((engine.exp() * strings.length * estimate).sum(), kl)
    torch.testing.assert_close((engine.exp() * weight.values).sum(), torch.ones((), dtype=torch.float64))
    exact = (2 * trainer - engine).exp().sum()
    torch.testing.assert_close((engine.exp() * square.values).sum(), exact)


@pytest.mark.parametrize("off", [0.25, -0.25])
def test_long_answers_of_a_bad_engine_stay_finite(packed, off):
    """8192 tokens off by 0.25 nat each: a ratio of e^2048, whose square must still give a sample size, not nan."""
    s = packed(lengths=(8192, 8192, 5))
    metrics = mismatch_metrics(replace(s, rollout_logp=s.old_logp - off))
    assert all(np.isfinite(values_of(metric)).all() for metric in metrics.values())
    mean, mean_square = (of.values.mean() for of in metrics["mismatch/effective_sample_size"].means)
    assert 0 < mean_square.item() < math.inf and 1 / 3 - 1e-9 < (mean**2 / mean_square).item() <= 1


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "flowrl", "tis": "token"}, ["objective.tis", "token", "'sum'"]),
        ({"name": "flowrl", "tis": "both"}, ["objective.tis", "both", "'mean'"]),
        ({"name": "grpo", "tis": "both"}, ["objective.tis", "both", "'token'"]),
        ({"name": "grpo", "tis_cap": 0}, ["objective.tis_cap", "0"]),
        ({"name": "flowrl", "tis_cap": float("inf")}, ["objective.tis_cap", "inf"]),
    ],
)
def test_wrong_settings_are_refused(section, words):
    """FlowRL's loss has no tokens to weigh one by one: asking for it must not train something else in silence."""
    with pytest.raises(ConfigError) as error:
        build(section)
    assert all(word in str(error.value) for word in words), str(error.value)


def test_missing_or_misshapen_log_probs_are_refused(packed):
    """A weight of 1 for want of log-probs would look like an engine that agrees."""
    s = packed()
    for objective in (FlowRL(tis="sum"), GRPO(tis="token")):
        with pytest.raises(AssertionError, match="rollout_logp.* missing"):
            objective.loss(replace(s, log_z=s.log_z if objective.log_z else None))
    with pytest.raises(AssertionError, match="rollout_logp is not"):
        replace(s, rollout_logp=s.old_logp[:1])


@pytest.mark.parametrize("reported", [[], [-1.0]])
def test_an_engine_that_reports_no_log_probs_is_told_before_an_update(reported):
    """Weights of 1 for want of log-probs would pass for a correction that was made."""
    rollouts = [Rollout([3, 4], reported, "stop", [(0, 2)])]
    config = SimpleNamespace(rollout=RolloutSettings(group_size=1, engine="sglang"))
    ahead = SimpleNamespace(rollout=RolloutSettings(group_size=1, engine="sglang", ahead=1))
    experience = Experience([], rollouts, [Score(1.0, "", False)])
    with pytest.raises(ConfigError, match="objective.tis = sum.*rollout.engine = sglang.*set objective.tis=none"):
        credited([], experience, FlowRL(tis="sum"), config, "cpu")
    for objective, settings in ((FlowRL(old="behaviour"), config), (GRPO(), ahead)):
        with pytest.raises(ConfigError, match="objective.old = .*ratios are against.*set objective.old=trainer"):
            credited([], experience, objective, settings, "cpu")
    assert credited([], experience, FlowRL(), config, "cpu") == []
