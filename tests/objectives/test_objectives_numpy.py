"""FlowRL against the paper's equations, written again in NumPy, and what holds for sums of every objective."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_metrics, flowrl_numpy, values_of
from torch.autograd import grad, gradcheck

from flowrl_mega.objectives import GRPO, FlowRL, LossInputs
from flowrl_mega.objectives.flowrl import flowrl_loss

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
WEIGHTS = ["paper", "released", "max10", "asym", "cap", "gspo", "none"]


@pytest.mark.parametrize("clip_gap", [False, True])
@pytest.mark.parametrize("z", ["mlp", "zero"])
@pytest.mark.parametrize("length_norm", [True, False])
@pytest.mark.parametrize("weight", WEIGHTS)
def test_flowrl_equals_numpy(packed, weight, length_norm, z, clip_gap):
    """Loss, gradients and metrics for every choice: a wrong normaliser, clip or sign shows here."""
    beta = 0.3 if clip_gap else 3.0  # some gaps within their bounds, some beyond
    objective = FlowRL(beta=beta, weight=weight, length_norm=length_norm, z=z, eps=0.3, clip_gap=clip_gap)
    drift = 0.2 if weight in ("paper", "asym", "cap") else 1.2  # some answers within the clip, some beyond
    s = packed(drift=drift, lengths=LENGTHS, log_z=z != "zero")
    out = objective.loss(s)
    loss, d_logp, d_z, metrics = flowrl_numpy(s, objective)
    assert out.count == 8 and out.loss_sum.dim() == 0
    assert weight in ("released", "none") or 0 < metrics["policy/clip_fraction"].mean() < 1
    assert not clip_gap or 0 < metrics["loss/gap_clipped"].mean() < 1
    np.testing.assert_allclose(out.loss_sum.item(), loss, rtol=1e-12)
    out.loss_sum.backward()
    np.testing.assert_allclose(s.logp.grad, d_logp, rtol=1e-11)
    if s.log_z is not None:
        np.testing.assert_allclose(s.log_z.grad, d_z, rtol=1e-12)
    assert_metrics(out, metrics)


@pytest.mark.parametrize(("weight", "w"), [("paper", [0.8, 1.1, 1.2, 1.2]), ("max10", [0.1, 1.1, 2.0, 10.0])])
def test_weight_is_clipped_where_it_is_used(weight, w):
    """An earlier implementation computed the clip and multiplied by the unclipped ratio: the loss and its gradient,
    not only the reported weight, must have the clipped one."""
    sum_logp = torch.tensor([-1.0, -2.0, -3.0, -4.0], dtype=torch.float64, requires_grad=True)
    ratio = torch.tensor([0.1, 1.1, 2.0, 50.0], dtype=torch.float64)
    zeros = torch.zeros(4, dtype=torch.float64)
    terms = flowrl_loss(0.0, sum_logp, zeros, ratio.log(), torch.ones(4).long(), zeros, beta=1.0, weight=weight)
    w = torch.tensor(w, dtype=torch.float64)
    torch.testing.assert_close(terms.weight, w)
    torch.testing.assert_close(terms.loss, w * sum_logp.detach() ** 2)
    torch.testing.assert_close(grad(terms.loss.sum(), sum_logp)[0], 2 * w * sum_logp.detach())


def test_a_huge_drift_stays_finite():
    """A trajectory ratio overflows e^710 after a bad step; the clip must still give its bound, not inf or nan."""
    one, sum_d = torch.ones(2, dtype=torch.float64), torch.tensor([2000.0, -2000.0], dtype=torch.float64)
    terms = flowrl_loss(0.0, -one, -2 * one, sum_d, torch.ones(2).long(), one, beta=3.0)
    torch.testing.assert_close(terms.weight, torch.tensor([1.2, 0.8], dtype=torch.float64))
    assert terms.loss.isfinite().all()


@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weight_is_exactly_one_on_the_first_mini_batch(packed, weight, dtype):
    """Before the first update pi_theta = pi_old: w = 1 and |sum d| = 0 to the last bit, or the scoring is not the
    update's own."""
    s = packed(lengths=(8192, 3, 1000), dtype=dtype)
    out = FlowRL(weight=weight).loss(replace(s, old_logp=s.logp.detach().clone()))
    assert (values_of(out.metrics["loss/flow_weight"]) == 1).all()
    assert (values_of(out.metrics["policy/max_abs_log_ratio"]) == 0).all()
    assert (values_of(out.metrics["policy/clip_fraction"]) == 0).all()


def test_long_sums_of_float32_log_probs_lose_nothing(rng):
    """Over 8192 tokens the d_t nearly cancel; summing in float32 would leave an error of its own in w."""
    logp = -3 * torch.rand(8192, generator=rng)
    old = logp + 3e-4 * torch.randn(8192, generator=rng)
    exact = math.fsum((logp.double() - old.double()).tolist())
    credit, ends = torch.ones(1), torch.tensor([0, 8192])
    for objective in (FlowRL(z="zero", weight="max10"), GRPO()):
        out = objective.loss(LossInputs(logp, old, logp, None, ends, credit))
        assert out.loss_sum.dtype == torch.float64
        assert abs(out.metrics["policy/max_abs_log_ratio"].values.item() - abs(exact)) < 1e-11
    sums = math.fsum(logp.double().tolist())
    out = FlowRL(z="zero").loss(LossInputs(logp, old, 0 * logp, None, ends, 0 * credit))
    assert abs(out.metrics["loss/residual"].values.item() - sums / 8192) < 1e-13


def test_gradients_by_finite_differences(packed):
    """Autograd against differences of the loss itself. FlowRL with w = 1 or with sum d held fixed, because a detached
    w is meant to differ from the difference quotient."""
    s = packed()

    def through(objective, **fields):
        return objective.loss(replace(s, **fields)).loss_sum

    assert gradcheck(lambda p, z: through(FlowRL(weight="none", beta=2.0), logp=p, log_z=z), (s.logp, s.log_z))
    assert gradcheck(lambda p: through(GRPO(kl_coef=0.1), logp=p, log_z=None), (s.logp,))
    sum_logp, sum_ref, sum_d = (s.sum(x).detach() for x in (s.logp, s.ref_logp, s.log_ratio()))
    assert gradcheck(
        lambda z, p: flowrl_loss(z, p, sum_ref, sum_d, s.length, s.credit, beta=2.0).loss,
        (s.log_z, sum_logp.requires_grad_()),
    )


def test_loss_is_a_sum_over_sequences(packed):
    """The trainer divides by the step's number of sequences, once: splitting a batch must not change the total."""
    s = packed()
    ends = s.cu_seqlens
    for objective in (FlowRL(), GRPO(kl_coef=0.1)):
        whole = replace(s, log_z=s.log_z if objective.log_z else None)
        parts = []
        for i in range(len(s.credit)):
            a, b = ends[i], ends[i + 1]
            part = replace(
                whole,
                logp=s.logp[a:b],
                old_logp=s.old_logp[a:b],
                ref_logp=s.ref_logp[a:b],
                log_z=None if whole.log_z is None else s.log_z[i : i + 1],
                cu_seqlens=torch.stack([a - a, b - a]),
                credit=s.credit[i : i + 1],
            )
            parts.append(objective.loss(part))
        torch.testing.assert_close(sum(p.loss_sum for p in parts), objective.loss(whole).loss_sum)
        assert sum(p.count for p in parts) == objective.loss(whole).count
