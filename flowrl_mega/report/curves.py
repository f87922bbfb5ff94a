"""Curves of at most POINTS points: of one run, or the mean of a method's seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from flowrl_mega.report.records import Columns, Floats

POINTS = 400


@dataclass
class Curve:
    """`low` to `high` is a band: of one run all its values between two points, of seeds a standard deviation to each
    side. NaN: no value there."""

    steps: Floats
    mean: Floats
    low: Floats
    high: Floats
    first: float
    last: float
    smallest: float
    largest: float
    seeds: int
    per_point: int  # steps that are averaged


def curve(runs: Sequence[Columns], name: str, points: int = POINTS) -> Curve | None:
    """None where no run has the metric."""
    having = [run for run in runs if name in run.values]
    if not having:
        return None
    steps, table = _side_by_side(having, name)
    there = ~np.isnan(table)
    count = there.sum(0)
    mean = np.where(there, table, 0.0).sum(0) / np.maximum(count, 1)
    if len(having) > 1:
        spread = np.sqrt(np.where(there, (table - mean) ** 2, 0.0).sum(0) / np.maximum(count - 1, 1))
        low, high = mean - spread, mean + spread
    else:
        low = high = mean
    kept = count > 0
    steps, mean, low, high = steps[kept], mean[kept], low[kept], high[kept]
    per_point = -(-len(steps) // points)
    starts = np.arange(0, len(steps), per_point)
    alone = len(having) == 1
    return Curve(
        steps=_averaged(steps, starts),
        mean=_averaged(mean, starts),
        low=np.minimum.reduceat(low, starts) if alone else _averaged(low, starts),
        high=np.maximum.reduceat(high, starts) if alone else _averaged(high, starts),
        first=float(mean[0]),
        last=float(mean[-1]),
        smallest=float(mean.min()),
        largest=float(mean.max()),
        seeds=len(having),
        per_point=per_point,
    )


def _side_by_side(runs: Sequence[Columns], name: str) -> tuple[Floats, Floats]:
    """All steps that a run has, and a row a run with its values there; NaN where it has none."""
    steps = np.unique(np.concatenate([run.steps for run in runs]))
    table = np.full((len(runs), len(steps)), np.nan)
    for row, run in zip(table, runs, strict=True):
        row[np.searchsorted(steps, run.steps)] = run.values[name]
    return steps, table


def _averaged(values: Floats, starts: NDArray[np.integer]) -> Floats:
    counts = np.diff(np.append(starts, len(values)))
    return np.add.reduceat(values, starts) / counts
