"""Rewards to credits: r_hat and the advantage, and the numbers that follow from them."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from flowrl_mega.objectives import GRPO, FlowRL, LossInputs

R_HAT = {1: 2.475, 2: 1.620, 3: 1.208, 4: 0.935, 5: 0.725, 6: 0.540, 7: 0.354}


def right(k: int, of: int) -> torch.Tensor:
    return torch.tensor([1.0] * k + [0.0] * (of - k))


def loss_at_reference(rewards: torch.Tensor) -> float:
    """FlowRL's mean loss of one group at pi = pi_ref and log Z = 0."""
    objective = FlowRL(z="zero")
    credit = objective.credit(rewards, torch.zeros(len(rewards), dtype=torch.int64))
    lengths = torch.arange(1, len(rewards) + 1)
    ends = torch.cat([torch.zeros(1, dtype=torch.int64), lengths.cumsum(0)])
    logp = torch.linspace(-2, -0.1, int(ends[-1]), dtype=torch.float64)
    out = objective.loss(LossInputs(logp, logp, logp, None, ends, credit))
    return out.loss_sum.item() / out.count


@pytest.mark.parametrize("objective", [FlowRL(), GRPO()])
@pytest.mark.parametrize("k", R_HAT)
@pytest.mark.parametrize("low", [0.0, -1.0])
def test_credit_of_k_right_of_8(objective, k, low):
    """The unbiased std, not the biased one, and blind to the reward's scale (0/1 or -1/+1)."""
    rewards = low + (1 - low) * right(k, 8)
    credit = objective.credit(rewards, torch.full((8,), 5))
    assert credit[0].item() == pytest.approx(R_HAT[k], abs=6e-4)
    assert abs(credit.sum().item()) < 1e-12


@pytest.mark.parametrize(("size", "loss"), [(8, 196.875), (16, 210.9375)])
def test_loss_of_a_mixed_group_at_the_reference(size, loss):
    """beta^2 (G - 1) / G whatever the pass rate: the number that a first training step must show."""
    for k in range(1, size):
        assert loss_at_reference(right(k, size)) == pytest.approx(loss, abs=2e-3)


@pytest.mark.parametrize("reward", [0.0, 1.0, 0.1])
def test_loss_of_a_uniform_group_at_the_reference_is_zero(reward):
    """All right or all wrong: nothing to learn at pi_ref, and no 0/0."""
    assert loss_at_reference(torch.full((8,), reward)) < 1e-12


def test_a_uniform_group_still_pulls_towards_the_reference(packed):
    """r_hat = 0 is not gradient 0: dropping uniform groups, as GRPO may, would drop FlowRL's pull to pi_ref."""
    s = packed(log_z=False)
    s = LossInputs(s.logp, s.logp.detach(), s.ref_logp, None, s.cu_seqlens, torch.zeros(5))
    FlowRL(z="zero").loss(s).loss_sum.backward()
    assert (s.logp.grad != 0).all()
    s.logp.grad = None
    GRPO().loss(s).loss_sum.backward()
    assert (s.logp.grad == 0).all()


@pytest.mark.parametrize("objective", [FlowRL(), GRPO()])
def test_unequal_and_interleaved_groups(objective, rng):
    """Groups are named by ids, not by position or a common size: filtered or reordered batches must not mix them."""
    group = torch.tensor([7, 2, 7, -1, 2, 900, 7, 2, 7, -1])
    rewards = torch.rand(10, generator=rng)
    expected = np.zeros(10)
    for g in group.unique():
        r = rewards.double().numpy()[group == g]
        mean, std = (r.mean(), r.std(ddof=1)) if len(r) > 1 else (0.0, 1.0)
        expected[group == g] = (r - mean) / (std + 1e-6)
    credit = objective.credit(rewards, group)
    assert credit.dtype == torch.float64
    np.testing.assert_allclose(credit.numpy(), expected, rtol=1e-12, atol=1e-12)


def test_a_group_of_one_keeps_its_reward():
    """Mean 0 and std 1, as the authors' code: no nan from an unbiased std of one number."""
    credit = FlowRL().credit(torch.tensor([0.5, -1.0]), torch.tensor([0, 1]))
    assert credit.tolist() == pytest.approx([0.5 / (1 + 1e-6), -1 / (1 + 1e-6)], abs=1e-15)


def test_raw_rewards_pass_through():
    """Only the raw reward has a fixed target; it must reach the loss as it is."""
    rewards = torch.tensor([0.0, 1.0, 0.25, -3.0])
    credit = FlowRL(reward_norm="none").credit(rewards, torch.zeros(4, dtype=torch.int64))
    assert credit.tolist() == rewards.tolist()
