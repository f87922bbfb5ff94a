"""A frozen log Z: what the reference's answers say of it, by NumPy, and where a policy with it comes to rest."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import flowrl_numpy, values_of
from torch.autograd import grad

from flowrl_mega.objectives import FlowRL

FROZEN = {"z": "frozen", "reward_norm": "none"}


@pytest.mark.parametrize("longest", [1, 8, 8192])
@pytest.mark.parametrize("length_norm", [True, False])
def test_the_estimate_is_the_root_by_numpy(length_norm, longest):
    """mean exp(|y| (beta r - c)) = 1, of which there is one c; without |y| it has a closed form. At 8,192 tokens the
    best answer alone decides, and nothing overflows."""
    draw = np.random.default_rng(0)
    rewards, lengths = draw.random((5, 12)), draw.integers(1, longest + 1, (5, 12))
    objective = FlowRL(beta=3.0, length_norm=length_norm, z_answers=12, **FROZEN)
    assert objective.reference_answers == 12
    found = objective.frozen_log_z(torch.from_numpy(rewards), torch.from_numpy(lengths)).numpy()
    scale = lengths if length_norm else np.ones_like(lengths)
    masses = np.exp(scale * (3.0 * rewards - found[:, None])).mean(1)
    np.testing.assert_allclose(masses, 1, rtol=1e-14 * longest + 1e-13)
    if not length_norm or longest == 1:
        np.testing.assert_allclose(found, np.log(np.exp(3.0 * rewards).mean(1)), rtol=1e-13)
    if longest == 8192 and length_norm:
        assert (abs(found - 3.0 * rewards.max(1)) < 0.05).all()


@pytest.mark.parametrize("reward", [0.0, 1.0, -0.3])
def test_of_equal_rewards_it_is_that_reward(reward):
    """To the bit, whatever the lengths: the residual of such an answer of the reference is 0."""
    lengths = torch.tensor([[3, 1, 900]])
    rewards = torch.full((1, 3), reward, dtype=torch.float64)
    assert FlowRL(beta=15.0, **FROZEN).frozen_log_z(rewards, lengths).tolist() == [15.0 * reward]


@pytest.mark.parametrize("clip_gap", [False, True])
@pytest.mark.parametrize("length_norm", [True, False])
def test_the_loss_with_a_given_log_z_equals_numpy(packed, length_norm, clip_gap):
    objective = FlowRL(beta=0.3, length_norm=length_norm, clip_gap=clip_gap, **FROZEN)
    s = packed(drift=0.2)
    out = objective.loss(s)
    loss, d_logp, _, metrics = flowrl_numpy(s, objective)
    np.testing.assert_allclose(out.loss_sum.item(), loss, rtol=1e-12)
    np.testing.assert_allclose(grad(out.loss_sum, s.logp)[0], d_logp, rtol=1e-11)
    np.testing.assert_allclose(values_of(out.metrics["loss/log_z"]), metrics["loss/log_z"], rtol=1e-12)
    with pytest.raises(AssertionError, match="z=frozen"):
        objective.loss(replace(s, log_z=None))


def test_all_answers_of_the_reference_give_flowrls_target(strings, reward):
    """Where every string is equally likely under the reference, each of them once is that reference exactly. A log Z
    that is off lets the policy rest elsewhere."""
    ref = strings.logits_of(torch.full((len(strings),), 1 / len(strings), dtype=torch.float64))
    objective = FlowRL(beta=0.4, **FROZEN)
    log_z = objective.frozen_log_z(reward[None], strings.length[None]).expand(len(strings))
    target = strings.target(ref, reward, 0.4)
    out = objective.loss(strings.sequences(target, reward, ref, log_z))
    np.testing.assert_allclose(values_of(out.metrics["loss/residual"]), 0, atol=1e-12)
    assert grad(out.loss_sum, target)[0].abs().max() < 1e-11
    off = objective.loss(strings.sequences(target, reward, ref, log_z + 0.1))
    assert grad(off.loss_sum, target)[0].abs().max() > 1e-3


@pytest.mark.parametrize(
    "objective",
    [FlowRL(beta=2.0), FlowRL(beta=0.3, clip_gap=True, length_norm=False), FlowRL(beta=2.0, **FROZEN)],
    ids=["learned", "clipped", "frozen"],
)
def test_the_gap_to_the_groups_own_estimate_equals_numpy(packed, objective):
    """Sums by prompt of log Z - (beta r - log(pi_theta / pi_ref) / |y|), before any clip, by the policy of now."""
    group = torch.tensor([0, 2, 0, 2, 0])
    s = replace(packed(drift=0.5), group=group, groups=4)
    _, _, _, metrics = flowrl_numpy(s, objective.model_copy(update={"clip_gap": False}))
    wanted = np.zeros((2, 4))
    for residual, prompt in zip(metrics["loss/residual"], group.tolist(), strict=True):
        wanted[:, prompt] += residual, 1
    np.testing.assert_allclose(objective.loss(s).metrics["loss/log_z_gap"].sums, wanted, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("z", ["group", "random"])
def test_what_is_no_log_z_of_the_prompt_has_no_gap(packed, z):
    objective, s = FlowRL(z=z), packed(log_z=False)
    s = replace(s, group=torch.tensor([0, 0, 1, 1, 1]), groups=2)
    (prepared,) = objective.prepare([replace(s, logp=s.old_logp)], lambda x: x, 2)
    assert "loss/log_z_gap" not in objective.loss(replace(s, prepared=prepared)).metrics
