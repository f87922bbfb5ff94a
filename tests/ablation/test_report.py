"""The table: figures of a run, their mean and spread over the seeds."""

from __future__ import annotations

import numpy as np
import pytest

from flowrl_mega.ablation.report import figures, summarise, table


def test_figures_of_a_run() -> None:
    """25 steps: the last tenth is three of them. A null, a number that was not finite, is in no mean."""
    rewards, entropies = np.linspace(0, 1, 25), np.geomspace(3, 0.1, 25)
    steps = [
        {
            "step": i + 1,
            "reward/mean": r,
            "policy/entropy": e,
            "rollout/response_length": 10 * r,
            "perf/step_seconds": 0.5,
        }
        for i, (r, e) in enumerate(zip(rewards.tolist(), entropies.tolist(), strict=True))
    ]
    steps[23]["policy/entropy"] = None
    evaluation = [{"step": 0, "reward": 9.0}, {"step": 25, "reward": 0.25, "pass@4": 0.5, "coverage": None}]
    found = figures(steps, evaluation)
    assert found == pytest.approx(
        {
            "reward": rewards[-3:].mean(),
            "entropy": (entropies[-3] + entropies[-1]) / 2,
            "response_length": 10 * rewards[-3:].mean(),
            "held_out_reward": 0.25,
            "held_out_pass@4": 0.5,
            "seconds": 12.5,
        }
    )
    assert figures(steps[:1], [])["reward"] == rewards[0], "a run of one step has a last tenth, too"


def test_the_table_is_mean_and_sample_deviation() -> None:
    """Against NumPy; a cell whose runs failed and a figure that one cell lacks are lines and places like others."""
    draw = np.random.default_rng(0).normal([0.5, 120.0, 3e-3], [0.1, 20.0, 1e-3], (3, 3))
    names = ("reward", "seconds", "held_out_kl")
    rows = {seed: dict(zip(names, values, strict=True)) for seed, values in enumerate(draw)}
    summary = {
        "weight=paper": {**summarise(rows), "failed": {}},
        "weight=none": {**summarise({0: {"reward": 0.25, "seconds": 7.0}}), "failed": {1: "exit code 1"}},
        "weight=max10": {**summarise({}), "failed": {}},
    }
    text = table(summary, [0, 1, 2])
    cells = [[cell.strip() for cell in line.strip("| ").split(" |")] for line in text.splitlines()[:5]]
    mean, std = draw.mean(0), draw.std(0, ddof=1)
    assert cells[0] == ["cell", "seeds", "reward", "held-out kl", "seconds"], "seconds come last"
    assert cells[2] == [
        "weight=paper", "3",
        f"{mean[0]:.3f} ± {std[0]:.3f}", f"{mean[2]:.5f} ± {std[2]:.5f}", f"{mean[1]:.0f} ± {std[1]:.0f}",
    ]  # fmt: skip
    assert cells[3] == ["weight=none", "1 of 3", "0.250", "-", "7"]
    assert cells[4] == ["weight=max10", "0 of 3", "-", "-", "-"]
    assert len({len(line) for line in text.splitlines()[:5]}) == 1, "columns stand under each other"
    assert "- weight=none, seed 1: exit code 1" in text and "seeds 0, 1, 2" in text
