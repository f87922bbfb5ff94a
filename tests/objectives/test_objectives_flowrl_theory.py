"""FlowRL's identities, checked exactly on a policy whose every string is enumerated."""

from __future__ import annotations

import pytest
import torch
from torch.autograd import grad

from flowrl_mega.objectives import GRPO, FlowRL
from flowrl_mega.objectives.flowrl import FlowTerms, flowrl_loss
from flowrl_mega.objectives.inputs import segment_sum

BETA = 2.0


def terms_of(strings, logits, ref, credit, log_z, old=None, **settings) -> FlowTerms:
    """FlowRL's terms of every string; on-policy unless the logits of an old policy are given."""
    logp = strings.token_logp(logits)
    old_logp = logp.detach() if old is None else strings.token_logp(old)
    sum_d = segment_sum(logp - old_logp, strings.cu_seqlens)
    sums = (strings.logp(logits), strings.logp(ref), sum_d)
    return flowrl_loss(log_z, *sums, strings.length, credit, **{"beta": BETA, **settings})


def expected_gradient(strings, logits, *args, **settings):
    """E_{y ~ pi}[grad (w delta^2)]: what a batch drawn from the policy estimates."""
    terms = terms_of(strings, logits, *args, **settings)
    return grad((strings.logp(logits).detach().exp() * terms.loss).sum(), logits)[0]


def kl(log_p, log_q):
    return (log_p.exp() * (log_p - log_q)).sum()


def target(strings, ref, reward):
    """log pi* = log pi_ref + beta r - log Z*, and log Z*."""
    score = strings.logp(ref) + BETA * reward
    return score.log_softmax(0), score.logsumexp(0)


def length_normalised_target(log_ref, length, reward, beta=BETA):
    """log pi* = log pi_ref + |y| (beta r - c), and c: the root of sum pi* = 1 (falling in c), by bisection."""
    low, high = -100.0, 100.0
    for _ in range(200):
        c = (low + high) / 2
        log_p = log_ref + length * (beta * reward - c)
        low, high = (c, high) if log_p.logsumexp(0) > 0 else (low, c)
    return log_p, c


def test_the_enumerated_policy_is_a_distribution(strings, logits):
    """Every identity below is an expectation: without mass 1 and several lengths it would be checked in vain."""
    assert len(strings) == 121 and strings.length.unique().tolist() == [1, 2, 3, 4, 5]
    assert abs(strings.logp(logits).logsumexp(0).item()) < 1e-12
    rebuilt = strings.logits_of(strings.logp(logits).detach().exp())
    torch.testing.assert_close(strings.logp(rebuilt), strings.logp(logits).detach())


@pytest.mark.parametrize("log_z", [-3.0, 0.0, 2.7])
def test_on_policy_gradient_is_twice_the_kl_gradient_for_any_log_z(strings, logits, ref, reward, log_z):
    """Check 1, the paper's claim itself: minimising the flow balance minimises KL(pi || pi_ref e^{beta r} / Z)."""
    flow = expected_gradient(strings, logits, ref, reward, log_z, length_norm=False)
    kl_gradient = grad(kl(strings.logp(logits), target(strings, ref, reward)[0]), logits)[0]
    torch.testing.assert_close(flow, 2 * kl_gradient, rtol=1e-10, atol=1e-13)


def test_optimum_without_length_norm(strings, ref, reward):
    """Check 2: at pi* with log Z* every residual is 0, so there is nothing left to learn, string by string."""
    log_p, log_z = target(strings, ref, reward)
    terms = terms_of(strings, strings.logits_of(log_p.exp()), ref, reward, log_z, length_norm=False)
    assert terms.delta.abs().max() < 1e-12 and terms.loss.max() < 1e-24


def test_best_log_z_of_a_fixed_policy(strings, logits, ref, reward):
    """Check 2: the logged log Z can be held against log Z* - KL(pi || pi*), an independent number."""
    log_z = torch.zeros((), dtype=torch.float64, requires_grad=True)
    log_pi = strings.logp(logits).detach()
    terms = terms_of(strings, logits, ref, reward, log_z, length_norm=False)
    slope = grad((log_pi.exp() * terms.loss).sum(), log_z)[0]
    best = -slope / 2  # the loss is log_z^2 + slope log_z + constant
    log_p, log_z_star = target(strings, ref, reward)
    torch.testing.assert_close(best, log_z_star - kl(log_pi, log_p), rtol=1e-12, atol=1e-12)


def test_optimum_with_length_norm_and_unequal_lengths(strings, ref, reward):
    """Check 3: dividing by |y| moves the optimum to pi_ref e^{|y| (beta r - c)} and log Z to c."""
    log_p, c = length_normalised_target(strings.logp(ref), strings.length, reward)
    assert abs(log_p.logsumexp(0)) < 1e-12
    terms = terms_of(strings, strings.logits_of(log_p.exp()), ref, reward, c)
    assert terms.delta.abs().max() < 1e-12
    plain, _ = target(strings, ref, reward)
    assert kl(log_p, plain) > 0.1, "the two optima must differ here, or the test says nothing"


def test_equal_lengths_have_inverse_temperature_beta_times_length(rng):
    """Check 3: with |y| = L for all, pi* = pi_ref e^{beta L r} / Z and log Z = log(Z) / L; beta = 15 is for long y."""
    log_ref = torch.randn(50, generator=rng, dtype=torch.float64).log_softmax(0)
    reward = torch.rand(50, generator=rng, dtype=torch.float64)
    length = torch.full((50,), 7)
    score = log_ref + BETA * 7 * reward
    log_p, log_z = score.log_softmax(0), score.logsumexp(0) / 7
    terms = flowrl_loss(log_z, log_p, log_ref, torch.zeros(50).double(), length, reward, beta=BETA)
    assert terms.delta.abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("length_norm", [False, True])
def test_descent_reaches_the_optimum(strings, ref, reward, length_norm):
    """Checks 2 and 3: the optimum is what training finds, log Z included, from pi_ref and log Z = 0."""
    logits, log_z = ref.clone().requires_grad_(), torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits, log_z], lr=0.05)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 800)
    for _ in range(800):
        terms = terms_of(strings, logits, ref, reward, log_z, length_norm=length_norm)
        optimizer.zero_grad()
        (strings.logp(logits).detach().exp() * terms.loss).sum().backward()
        optimizer.step()
        schedule.step()
    if length_norm:
        log_p, best = length_normalised_target(strings.logp(ref), strings.length, reward)
    else:
        log_p, best = target(strings, ref, reward)
    start = kl(strings.logp(ref), log_p)
    assert start > 0.05 and kl(strings.logp(logits), log_p) < 1e-3 * start  # rare strings are learnt last
    assert abs(log_z - best) < 1e-3


def test_too_large_a_log_z_pushes_towards_longer_answers(strings, ref):
    """Check 3: with delta = log Z > 0 everywhere, 1/|y| pushes short answers down hardest: watch log Z and length."""
    logits = ref.clone().requires_grad_()
    none = torch.zeros(len(strings), dtype=torch.float64)
    step = -expected_gradient(strings, logits, ref, none, 0.5)
    mean_length = (strings.logp(logits).exp() * strings.length).sum()
    assert (grad(mean_length, logits)[0] * step).sum() > 0


def early_gradients(strings, logits, ref, log_z):
    """Gradients of FlowRL and GRPO on 16 interleaved groups, drawn from the policy's support, rewards 0 and 1."""
    group = torch.arange(len(strings)) % 16
    rewards = (torch.arange(len(strings)) % 3 == 0).double()
    flow, grpo = FlowRL(), GRPO()
    z = torch.full((len(strings),), log_z, dtype=torch.float64)
    batch = strings.sequences(logits, flow.credit(rewards, group), ref, z)
    a = grad(flow.loss(batch).loss_sum, logits)[0].flatten()
    batch = strings.sequences(logits, grpo.credit(rewards, group), ref)
    b = grad(grpo.loss(batch).loss_sum, logits)[0].flatten()
    return a, b


def test_early_gradient_is_grpo_times_2_beta(strings, ref, rng):
    """Check 5: at pi = pi_ref and log Z = 0 the paper's FlowRL is GRPO with 30 times the gradient; close by, nearly."""
    a, b = early_gradients(strings, ref.clone().requires_grad_(), ref, 0.0)
    assert b.norm() > 1e-3
    torch.testing.assert_close(a, 30 * b, rtol=1e-10, atol=1e-12)
    noise = 0.02 * torch.randn(ref.shape, generator=rng, dtype=torch.float64)
    a, b = early_gradients(strings, (ref + noise).requires_grad_(), ref, 0.05)
    cosine = torch.cosine_similarity(a, b, dim=0)
    assert 0.999 < cosine < 1 - 1e-9


def test_detached_importance_weight_gives_the_on_policy_gradient(strings, logits, ref, reward, rng):
    """Check 6: strings of an older policy, weighted by the exact ratio, teach what fresh strings would; a weight that
    carries gradient teaches something else."""
    old = (logits + 0.05 * torch.randn(ref.shape, generator=rng, dtype=torch.float64)).detach()
    p_old = strings.logp(old).exp()
    terms = terms_of(strings, logits, ref, reward, 0.3, old=old, weight="max10")
    assert not terms.weight.requires_grad
    assert terms.clipped.sum() == 0 and (terms.weight - 1).abs().max() > 0.1, "exact weights, and not trivial ones"
    on_policy = expected_gradient(strings, logits, ref, reward, 0.3)
    weighted = grad((p_old * terms.loss).sum(), logits)[0]
    torch.testing.assert_close(weighted, on_policy, rtol=0, atol=1e-15)

    ratio = (strings.logp(logits) - strings.logp(old)).exp()
    delta = terms_of(strings, logits, ref, reward, 0.3, old=old).delta
    undetached = grad((p_old * ratio * delta.square()).sum(), logits)[0]
    assert (undetached - on_policy).norm() > 0.1 * on_policy.norm()
