"""With pi_old as its reference FlowRL takes mirror steps: each ends at pi_old e^{beta r} / Z, so after k of them the
policy is pi_ref e^{k beta r} / Z, and with the reference that the run started from it would be pi_ref e^{beta r} / Z.

A step is one exactly only where its updates go on until the residual is gone: here 200, each on answers of its own.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from rank_pool import RankPool
from torch import Tensor

from examples.exact import space, targets
from examples.exact.job import train
from examples.exact.rows import ROWS

pytestmark = [pytest.mark.exact, pytest.mark.ranks, pytest.mark.timeout(900)]
TOLERANCE = 0.012  # of KL, nats


def test_each_step_is_a_mirror_step(ranks2: RankPool, task: Path, ref_logp: Tensor) -> None:
    row = ROWS["mirror-steps"]
    run, _ = ranks2.run(train, task, task / "mirror", row.steps, row.sections, watch=1, timeout=800)
    assert sorted(run.watched) == list(range(row.steps + 1))
    beta = row.objective["beta"]
    path = [(ref_logp + k * beta * space.rewards()).log_softmax(1) for k in range(row.steps + 1)]
    for k, logp in run.watched.items():
        distances = [float(targets.kl(logp, along).mean()) for along in path]
        assert distances[k] < TOLERANCE, f"after {k} steps: KL to each point of the path {distances}"
        slope = float(targets.inverse_temperature(logp, ref_logp, length_norm=False).mean())
        assert abs(slope - k * beta) < 0.05 * k * beta + 1e-3, f"after {k} steps the policy follows {slope:.3f}"
    ends = [targets.kl(path[k], path[k + 1]).mean() for k in range(row.steps)]
    assert min(ends) > 2 * TOLERANCE, "a step more or less is another policy"
