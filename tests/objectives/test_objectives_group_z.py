"""log Z from the group itself (z: group): its definition in NumPy, and what it does to the gradient, exactly."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import split, values_of
from torch.autograd import grad

from flowrl_mega.objectives import FlowRL, LossInputs
from flowrl_mega.objectives.flowrl import flowrl_loss

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
GROUP = torch.tensor([0, 2, 1, 0, 2, 1, 1, 3])


def own_numpy(s, o):
    """beta r - (log pi_old(y|x) - log pi_ref(y|x)) / |y| of each answer: the log Z that makes its residual 0."""
    rows = zip(split(s, s.old_logp), split(s, s.ref_logp), s.credit.tolist(), strict=True)
    return np.array([o.beta * r - (old - ref).sum() / (len(old) if o.length_norm else 1) for old, ref, r in rows])


@pytest.mark.parametrize("leave_one_out", [False, True])
@pytest.mark.parametrize("length_norm", [True, False])
def test_log_z_equals_numpy(packed, length_norm, leave_one_out):
    """The mean over the prompt's answers, with or without the answer's own term; one without others has 0."""
    objective = FlowRL(z="group", beta=3, length_norm=length_norm, z_leave_one_out=leave_one_out)
    s = replace(packed(lengths=LENGTHS, log_z=False), group=GROUP)
    own, group = own_numpy(s, objective), GROUP.numpy()
    expected = []
    for i in range(len(own)):
        others = [own[j] for j in range(len(own)) if group[j] == group[i] and not (leave_one_out and i == j)]
        expected.append(np.mean(others) if others else 0.0)
    prepared = objective.prepare([s], lambda x: x, 4)[0]
    np.testing.assert_allclose(prepared["log_z"], expected, rtol=1e-12, atol=1e-14)
    out = objective.loss(replace(s, prepared=prepared))
    np.testing.assert_allclose(values_of(out.metrics["loss/log_z"]), expected, rtol=1e-12, atol=1e-14)


def test_residuals_of_a_group_have_mean_zero(packed):
    """Before the first update: what the learned log Z is to come to, the group has at once."""
    objective = FlowRL(z="group", beta=3)
    s = replace(packed(lengths=LENGTHS, log_z=False), group=GROUP)
    s = replace(s, logp=s.old_logp, prepared=objective.prepare([s], lambda x: x, 4)[0])
    residual = objective.loss(s).metrics["loss/residual"].values
    sums = torch.zeros(4, dtype=torch.float64).index_add(0, GROUP, residual)
    torch.testing.assert_close(sums, torch.zeros_like(sums))
    assert residual.abs().max() > 0.1


@pytest.mark.parametrize("leave_one_out", [False, True])
def test_the_estimate_shrinks_the_gradient_unless_the_answer_is_left_out(strings, logits, ref, reward, leave_one_out):
    """On average over every pair of answers (G = 2) of an on-policy group. Left out, the estimate is independent of the
    answer, so the gradient is that of any log Z, 2 grad KL(pi || pi*); with it in, it is (G - 1) / G of that."""
    beta, n = 2.0, len(strings)
    objective = FlowRL(z="group", beta=beta, length_norm=False, reward_norm="none", z_leave_one_out=leave_one_out)
    first, second = torch.cartesian_prod(torch.arange(n), torch.arange(n)).T
    log_p, log_ref = strings.logp(logits), strings.logp(ref)
    answers = torch.cat([first, second])  # as answers of one token: log Z of sums is blind to where a token ends
    group = torch.arange(n * n).repeat(2)
    ends = torch.arange(len(answers) + 1)
    s = LossInputs(*(x.detach()[answers] for x in (log_p, log_p, log_ref)), None, ends, reward[answers], group=group)
    log_z = objective.prepare([s], lambda x: x, n * n)[0]["log_z"][: n * n]

    zeros, length = torch.zeros(n * n, dtype=torch.float64), torch.ones(n * n).long()
    terms = flowrl_loss(log_z, log_p[first], log_ref[first], zeros, length, reward[first], beta=beta, length_norm=False)
    weight = (log_p[first] + log_p[second]).detach().exp()
    gradient = grad((weight * terms.loss).sum(), logits, retain_graph=True)[0]

    score = strings.logp(ref) + beta * reward
    kl = (log_p.exp() * (log_p - score.log_softmax(0))).sum()
    expected = 2 * grad(kl, logits)[0]
    torch.testing.assert_close(gradient, expected if leave_one_out else expected / 2, rtol=1e-10, atol=1e-13)
