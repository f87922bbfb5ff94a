"""A log Z that is too large favours longer answers, and one that is too small shorter ones: by how much is known.

With the same reward for every answer nothing is to be learned, and with log Z held at 0 the residual starts at the same
-beta r for all of them: as if log Z were wrong by that. Divided by |y|, it moves a short answer's tokens most.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor

from examples.exact import space, targets
from examples.exact.job import COMMON, rollout, train

pytestmark = [pytest.mark.exact, pytest.mark.ranks, pytest.mark.timeout(600)]

STEPS, ANSWERS, WATCH = 100, 64, 10
TOLERANCE = 0.1  # of the mean length; what is expected is 2.5 times that


def low(row: dict[str, Any], response: str) -> float:
    """As if log Z were too large by 1 (at beta 1)."""
    return -1.0


def high(row: dict[str, Any], response: str) -> float:
    """As if log Z were too small by 1."""
    return 1.0


def trained_length(pool: RankPool, task: Path, folder: Path, reward: str, length_norm: bool) -> float:
    """E|y|, the mean over the prompts and over the last half of training: a residual that never ends is noise."""
    objective = {"name": "flowrl", "beta": 1.0, "reward_norm": "none", "z": "zero", "length_norm": length_norm}
    sections = {
        "objective": objective,
        "reward": f"{__name__}:{reward}",
        "rollout": rollout(ANSWERS),
        "optimizer": COMMON["optimizer"] | {"lr": 5e-4},
    }
    run, _ = pool.run(train, task, folder, STEPS, sections, tp=2, watch=WATCH, timeout=300)
    late = [targets.mean_length(logp).mean() for step, logp in run.watched.items() if step > STEPS / 2]
    return float(torch.stack(late).mean())


@pytest.mark.parametrize(("reward", "sign"), [("low", 1), ("high", -1)])
def test_a_wrong_log_z_favours_a_length(
    ranks2: RankPool, task: Path, ref_logp: Tensor, tmp_path: Path, reward: str, sign: int
) -> None:
    """Check 3's last line: the sign, and with `targets.fixed_target` the size too."""
    constant = torch.full_like(ref_logp, -sign)
    log_p, slope = targets.fixed_target(ref_logp, 1.0, torch.zeros(len(space.PROMPTS)).double(), constant)
    start, end = (float(targets.mean_length(logp).mean()) for logp in (ref_logp, log_p))
    assert (sign * slope > 0).all() and sign * (end - start) > 2.5 * TOLERANCE, "the closed form says so already"
    found = trained_length(ranks2, task, tmp_path / "run", reward, length_norm=True)
    assert abs(found - end) < TOLERANCE, f"E|y| went from {start:.3f} to {found:.3f}, and should to {end:.3f}"


@pytest.mark.parametrize("reward", ["low", "high"])
def test_without_length_norm_it_does_not(
    ranks2: RankPool, task: Path, ref_logp: Tensor, tmp_path: Path, reward: str
) -> None:
    """Check 1: there the gradient is that of the KL for any log Z, and the policy is where it belongs."""
    start = float(targets.mean_length(ref_logp).mean())
    found = trained_length(ranks2, task, tmp_path / "run", reward, length_norm=False)
    assert abs(found - start) < TOLERANCE, f"E|y| went from {start:.3f} to {found:.3f}, and should stay"
