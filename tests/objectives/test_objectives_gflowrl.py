"""GFlowRL against its equations in NumPy, what is the same under another name, and where it comes to rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import split, values_of
from torch.autograd import grad

from flowrl_mega.objectives import FlowRL, GFlowRL, LossInputs
from flowrl_mega.objectives.flowrl import flowrl_loss

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
GROUP = torch.tensor([0, 2, 1, 0, 2, 1, 1, 0])


def prepared(objective, s, groups=3):
    return replace(s, prepared=objective.prepare([replace(s, logp=s.old_logp)], lambda x: x, groups)[0])


def gflowrl_numpy(s, o, group):
    """Eq. 4 and 6-8 of arXiv 2607.13394 an answer at a time, with Z as Eq. 6 has it or as Eq. 4 is printed."""
    rows = list(zip(split(s, s.logp), split(s, s.old_logp), split(s, s.ref_logp), s.credit.tolist(), strict=True))
    own = [o.beta * r - (old - ref).sum() / (1 if o.z_as_printed else len(old)) for _, old, ref, r in rows]
    loss, gradient = 0.0, []
    for i, (logp, old, ref, r) in enumerate(rows):
        z = np.mean([own[j] for j in range(len(rows)) if group[j] == group[i]])
        g = z + (old - ref).sum() / len(old) - o.beta * r
        delta = np.clip(g, -o.eps, o.eps_high) + (logp - old).sum() / len(old)
        w = min(np.exp((logp - old).sum()), 1 + o.eps_high)
        loss += w * delta**2
        gradient += [2 * w * delta / len(old)] * len(old)
    return loss, np.array(gradient)


@pytest.mark.parametrize("printed", [False, True])
def test_gflowrl_equals_numpy(packed, printed):
    objective = GFlowRL(beta=0.3, z_as_printed=printed)
    s = prepared(objective, replace(packed(lengths=LENGTHS, drift=0.2, log_z=False), group=GROUP))
    loss, gradient = gflowrl_numpy(s, objective, GROUP.tolist())
    out = objective.loss(s)
    assert 0 < values_of(out.metrics["loss/gap_clipped"]).mean() < 1
    assert 0 < values_of(out.metrics["policy/clip_fraction"]).mean() < 1
    np.testing.assert_allclose(out.loss_sum.item(), loss, rtol=1e-12)
    out.loss_sum.backward()
    np.testing.assert_allclose(s.logp.grad, gradient, rtol=1e-11)


def test_without_its_clip_it_is_flowrl_with_the_groups_z(packed):
    """So that results of the two can be told apart by one setting at a time."""
    s = replace(packed(lengths=LENGTHS, log_z=False), group=GROUP)
    one = GFlowRL(beta=3, clip_gap=False)
    other = FlowRL(beta=3, z="group", weight="cap", reward_norm="none")
    assert torch.equal(one.loss(prepared(one, s)).loss_sum, other.loss(prepared(other, s)).loss_sum)
    one, other = GFlowRL(beta=0.3), FlowRL(beta=0.3, z="group", weight="cap", reward_norm="none", clip_gap=True)
    assert torch.equal(one.loss(prepared(one, s)).loss_sum, other.loss(prepared(other, s)).loss_sum)


def test_vargrad_pairwise_and_the_groups_z_are_one_gradient(packed):
    """At the first update: the variance of the gaps in a group (VarGrad), the squared differences of all pairs
    (Stable-GFN) and the residuals with the group's own log Z, up to a factor of the group's size alone."""
    objective = FlowRL(z="group", beta=2, weight="none", reward_norm="none")
    s = replace(packed(lengths=LENGTHS, drift=0.0, log_z=False), group=GROUP)
    slope = grad(objective.loss(prepared(objective, s)).loss_sum, s.logp)[0]
    gap = s.mean(s.logp) - s.mean(s.ref_logp) - 2 * s.credit  # [B]
    for g in range(3):
        rows = torch.eq(GROUP, g)
        size, tokens = int(rows.sum()), s.per_token(rows)
        vargrad = grad(gap[rows].var(correction=0), s.logp, retain_graph=True)[0]
        pairs = (gap[rows][:, None] - gap[rows][None, :]).square().sum()
        pairwise = grad(pairs, s.logp, retain_graph=True)[0]
        torch.testing.assert_close(vargrad[tokens] * size, slope[tokens], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(pairwise[tokens] / (2 * size), slope[tokens], rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize("groups", [1, 7])
@pytest.mark.parametrize("objective", [GFlowRL(beta=0.4), GFlowRL(beta=0.4, clip_gap=False, weight="none")])
def test_flowrls_target_is_where_it_rests(strings, ref, reward, objective, groups):
    """With 1/|y| in Z every gap is 0 there, in groups of any size: nothing is clipped, nothing moves."""
    target = strings.target(ref, reward, 0.4)
    s = replace(strings.sequences(target, reward, ref), group=torch.arange(len(strings)) % groups)
    out = objective.loss(prepared(objective, s, groups))
    np.testing.assert_allclose(values_of(out.metrics["loss/residual"]), 0, atol=1e-10)
    np.testing.assert_allclose(grad(out.loss_sum, target)[0], 0, atol=1e-10)


def test_stale_answers_leave_one_residual_a_group(strings, ref, reward, logits):
    """The group's Z is that of who wrote them: what is left at the target is the same for all answers of a group."""
    target = strings.target(ref, reward, 0.4)
    s = replace(strings.sequences(target, reward, ref), group=torch.arange(len(strings)) % 7)
    s = replace(s, old_logp=strings.token_logp(logits).detach())
    objective = GFlowRL(beta=0.4, clip_gap=False)
    delta = values_of(objective.loss(prepared(objective, s, 7)).metrics["loss/residual"])
    for g in range(7):
        np.testing.assert_allclose(delta[s.group == g], delta[s.group == g][0], atol=1e-10)
    assert abs(delta).min() > 1e-4


def test_as_printed_it_rests_elsewhere(strings, ref, reward):
    """Without 1/|y| in Z the gaps at FlowRL's own target are not 0, unless all answers are of one token."""
    s = strings.sequences(ref.clone().requires_grad_(), reward, ref + 0.3)
    s = replace(s, group=torch.zeros(len(strings), dtype=torch.int64), logp=s.logp + 0.1)
    s = replace(s, old_logp=s.logp.detach())
    one, other = (prepared(GFlowRL(clip_gap=False, z_as_printed=p), s, 1).prepared["log_z"] for p in (False, True))
    assert (one - other).abs().min() > 1e-3


def test_at_the_papers_beta_every_answer_of_a_mixed_group_is_clipped():
    """beta 8, G 16, rewards 0 or 1, pi_old = pi_ref: |gap| >= beta / G = 0.5 > 0.28, so the loss is nearly a sign."""
    for right in range(1, 16):
        logp = torch.full((16,), -1.0, dtype=torch.float64, requires_grad=True)
        credit = (torch.arange(16) < right).double()
        ends, group = torch.arange(17), torch.zeros(16, dtype=torch.int64)
        s = LossInputs(logp, logp.detach(), logp.detach(), None, ends, credit, group=group)
        out = GFlowRL().loss(prepared(GFlowRL(), s, 1))
        assert values_of(out.metrics["loss/gap_clipped"]).all()
        out.loss_sum.backward()
        assert sorted({round(x, 6) for x in logp.grad.tolist()}) == [-0.4, 0.56], (
            "2 x -0.2 for right, 2 x 0.28 for wrong"
        )


def test_old_as_reference_needs_no_model(packed):
    """A mirror step: from pi_old, whose log-ratio to itself is 0."""
    objective = FlowRL(z="group", beta=3, weight="none", reward_norm="none", reference="old")
    assert not objective.needs_reference
    s = replace(packed(lengths=LENGTHS, log_z=False, reference=False), group=GROUP)
    as_reference = FlowRL(z="group", beta=3, weight="none", reward_norm="none")
    other = replace(s, ref_logp=s.old_logp)
    found, wanted = objective.loss(prepared(objective, s)), as_reference.loss(prepared(as_reference, other))
    assert torch.equal(found.loss_sum, wanted.loss_sum)
    assert torch.equal(grad(found.loss_sum, s.logp)[0], grad(wanted.loss_sum, s.logp)[0])


def test_a_random_log_z_is_one_number_a_prompt_and_the_same_everywhere(packed):
    """From N(0.5, 1), another one each step; replicas and a resumed run draw alike."""
    objective, drawn = FlowRL(z="random"), []
    for step in range(400):
        s = replace(packed(lengths=(2, 3, 1), log_z=False), group=torch.tensor([0, 1, 0]))
        first, second, third = prepared(objective, s, 2).prepared["log_z"].tolist()
        assert first == third != second, step
        assert prepared(objective, s, 2).prepared["log_z"].tolist() == [first, second, third]
        drawn += [first, second]
    assert abs(np.mean(drawn) - 0.5) < 0.15 and abs(np.std(drawn) - 1) < 0.1
    assert len(set(drawn)) == len(drawn)


def test_a_weight_without_a_floor_stops_counting_what_the_policy_has_left():
    """The paper's clip keeps 0.8 of an answer that has become 1000 times less likely; cap keeps 0.001 of it."""
    zeros = torch.zeros(3, dtype=torch.float64)
    sum_d = torch.tensor([1e-3, 1.1, 5.0], dtype=torch.float64).log()
    ones = torch.ones(3).long()
    terms = flowrl_loss(0.0, zeros, zeros, sum_d, ones, zeros, beta=1.0, weight="cap", eps_high=0.28)
    torch.testing.assert_close(terms.weight, torch.tensor([1e-3, 1.1, 1.28], dtype=torch.float64))
    assert terms.clipped.tolist() == [0, 0, 1]
