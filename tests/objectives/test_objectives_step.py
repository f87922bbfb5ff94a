"""What objectives make of a whole step, before its first update: the same however the step is shared out."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from threading import Barrier

import pytest
import torch

from flowrl_mega.objectives import GRPO, PPO, FlowRL, ReinforcePP

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)
GROUP = torch.tensor([0, 2, 1, 0, 2, 1, 1, 3])
OF_A_STEP = [
    FlowRL(z="group", beta=3),
    FlowRL(z="group", beta=3, z_leave_one_out=True, length_norm=False),
    ReinforcePP(kl_coef=0.2),
    PPO(kl_coef=0.2, lam=0.9),
]


@pytest.fixture
def scored(packed, rng):
    """A step as pi_old has scored it, in one micro-batch."""
    s = packed(lengths=LENGTHS, log_z=False)
    value = torch.randn(sum(LENGTHS), generator=rng, dtype=torch.float64)
    return replace(s, logp=s.old_logp, group=GROUP, value=value)


def on_replicas(objective, shares, groups):
    """`prepare` of each replica's micro-batches, all at once, their sums meeting as all-reduces do."""
    barrier, given = Barrier(len(shares)), [None] * len(shares)

    def replica(rank):
        def total(x):
            given[rank] = x
            barrier.wait(timeout=10)
            summed = torch.stack(given).sum(0)
            barrier.wait(timeout=10)
            return summed

        return objective.prepare(shares[rank], total, groups)

    with ThreadPoolExecutor(len(shares)) as pool:
        return list(pool.map(replica, range(len(shares))))


@pytest.mark.parametrize("objective", OF_A_STEP, ids=lambda o: o.name)
def test_the_layout_of_a_step_changes_nothing(scored, objective):
    """Advantages are normalised over the tokens of the whole step, and a group's answers may lie anywhere in it: two
    replicas with unequal numbers of micro-batches and tokens must come to what one micro-batch of everything gives."""
    whole = objective.prepare([scored], lambda x: x, 4)[0]
    parts = [part(scored, a, b) for a, b in ((0, 2), (2, 3), (3, 8))]
    first, second = on_replicas(objective, [parts[:2], parts[2:]], 4)
    assert whole and [p.keys() for p in first + second] == [whole.keys()] * 3
    for name, expected in whole.items():
        torch.testing.assert_close(torch.cat([p[name] for p in first + second]), expected, rtol=1e-12, atol=1e-13)


def part(s, start, stop):
    """Sequences start to stop of a micro-batch, as one of its own."""
    a, b = s.cu_seqlens[start], s.cu_seqlens[stop]
    tokens = {name: getattr(s, name)[a:b] for name in ("logp", "old_logp", "ref_logp", "value")}
    answers = {name: getattr(s, name)[start:stop] for name in ("credit", "group")}
    return replace(s, **tokens, **answers, cu_seqlens=s.cu_seqlens[start : stop + 1] - a)


@pytest.mark.parametrize("objective", OF_A_STEP, ids=lambda o: o.name)
def test_what_is_prepared_is_constant(scored, objective):
    """Neither the critic nor pi_old gets a gradient through the policy's loss, also when they come from a graph."""
    s = replace(scored, value=scored.value.requires_grad_(), old_logp=scored.old_logp.requires_grad_())
    assert not any(value.requires_grad for value in objective.prepare([s], lambda x: x, 4)[0].values())


def test_others_need_nothing_of_the_step(scored):
    """What they train on is the micro-batch alone, so no replica waits for another."""

    def total(x):
        raise AssertionError("asked for a sum over the replicas")

    for objective in (GRPO(), FlowRL(), FlowRL(z="constant")):
        assert objective.prepare([scored, scored], total, 4) == [{}, {}]
