"""Curves against Python's own means and deviations, over steps that runs do not share."""

from __future__ import annotations

import random
import statistics

import pytest

from flowrl_mega.report.curves import curve
from flowrl_mega.report.records import Columns


def columns(steps, seed):
    draw = random.Random(seed)
    return Columns([{"step": step, "a": None if draw.random() < 0.1 else draw.gauss(0, 1)} for step in steps])


def test_seeds_have_a_mean_and_a_sample_standard_deviation():
    """At each step of those seeds that have a number there; one alone has no spread."""
    runs = [columns(range(1, 41), 0), columns(range(1, 31), 1), columns(range(11, 51), 2)]
    found = curve(runs, "a")
    at = {}
    for run in runs:
        for step, value in zip(run.steps, run.values["a"], strict=True):
            if value == value:
                at.setdefault(step, []).append(value)
    steps = sorted(at)
    mean = [statistics.fmean(at[step]) for step in steps]
    spread = [statistics.stdev(at[step]) if len(at[step]) > 1 else 0.0 for step in steps]
    assert found.steps.tolist() == steps and found.seeds == 3
    assert found.mean.tolist() == pytest.approx(mean)
    assert found.low.tolist() == pytest.approx([m - s for m, s in zip(mean, spread, strict=True)])
    assert found.high.tolist() == pytest.approx([m + s for m, s in zip(mean, spread, strict=True)])
    assert (found.first, found.last) == pytest.approx((mean[0], mean[-1]))
    assert (found.smallest, found.largest) == pytest.approx((min(mean), max(mean)))


@pytest.mark.parametrize("count", [1, 2, 399, 400, 401, 799, 1003])
def test_many_steps_become_few_points(count):
    """Of one run: means of neighbours, in a band of all their values."""
    run = Columns([{"step": step, "a": float(step * step % 97)} for step in range(1, count + 1)])
    found, values = curve([run], "a"), [float(step * step % 97) for step in range(1, count + 1)]
    size = -(-count // 400)
    groups = [values[at : at + size] for at in range(0, count, size)]
    assert len(groups) <= 400 and found.per_point == size
    assert found.mean.tolist() == pytest.approx([statistics.fmean(group) for group in groups])
    assert found.low.tolist() == [min(group) for group in groups]
    assert found.high.tolist() == [max(group) for group in groups]
    assert (found.first, found.last) == (values[0], values[-1])


def test_a_metric_that_no_run_has():
    assert curve([columns(range(5), 0)], "b") is None
    assert curve([Columns([{"step": 1, "a": None}])], "a") is None
