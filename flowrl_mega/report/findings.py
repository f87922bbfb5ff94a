"""What looks wrong in a run, one sentence each. A bound is where a reader should look, not where a run has failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np

from flowrl_mega.report.records import Floats
from flowrl_mega.report.run import Run
from flowrl_mega.report.text import number

MISMATCH, SAMPLE_SIZE, CUT_OFF, GRAD_NORM, DISTINCT = 0.05, 0.3, 0.5, 1000.0, 0.25
LEAST_STEPS = 40  # fewer say nothing about a reward that moves, or answers that become alike
MOST_NULLS = 8  # metrics that are named


def findings(run: Run) -> list[str]:
    return [sentence for check in CHECKS for sentence in check(run)] if run.has_trained else []


def _skipped(run: Run) -> Iterator[str]:
    for name in ("policy/skipped_updates", "critic/skipped_updates"):
        values = run.metrics.values.get(name, np.empty(0))
        if (total := np.nansum(values)) > 0:
            first = run.metrics.steps[np.flatnonzero(values > 0)[0]]
            yield f"Updates were skipped ({name}): {number(float(total))} in all, the first at step {first:.0f}."


def _nulls(run: Run) -> Iterator[str]:
    nulls, steps = run.metrics.nulls, len(run.metrics.steps)
    for name, at in list(nulls.items())[:MOST_NULLS]:
        yield f"{name} was NaN or infinite at {len(at)} of {steps} steps, first at step {at[0]}."
    if len(nulls) > MOST_NULLS:
        yield f"{len(nulls) - MOST_NULLS} more metrics were NaN or infinite at some step."


def _mismatch(run: Run) -> Iterator[str]:
    mean = _recent(run, "mismatch/abs_logp_diff")
    if mean > MISMATCH:
        yield (
            "Engine and trainer disagree: the mean distance of their log-probs (mismatch/abs_logp_diff) is "
            f"{number(mean)} over the last steps, above {MISMATCH}."
        )


def _sample_size(run: Run) -> Iterator[str]:
    for name in ("policy/weight_sample_size", "mismatch/effective_sample_size"):
        mean = _recent(run, name)
        if mean < SAMPLE_SIZE:
            yield f"Few answers carry the weight: {name} is {number(mean)} over the last steps, below {SAMPLE_SIZE}."


def _cut_off(run: Run) -> Iterator[str]:
    share = 1 - _recent(run, "rollout/stopped")
    if share > CUT_OFF:
        yield f"{share:.0%} of the last steps' answers were cut off at rollout.max_tokens (1 - rollout/stopped)."


def _uniform(run: Run) -> Iterator[str]:
    if _recent(run, "reward/uniform_groups") > 0.999:
        yield "All answers to each prompt had the same reward in the last steps (reward/uniform_groups is 1)."


def _reward(run: Run) -> Iterator[str]:
    """The last quarter against the first, by the standard error of the difference."""
    values = run.metrics.known("reward/mean")
    if len(values) < LEAST_STEPS:
        return
    first, last = values[: len(values) // 4], values[-(len(values) // 4) :]
    moved = float(last.mean() - first.mean())
    error = float(np.sqrt(first.var(ddof=1) / len(first) + last.var(ddof=1) / len(last)))
    told = f"{number(float(first.mean()))} in the first quarter of the steps, {number(float(last.mean()))} in the last"
    if abs(moved) <= 2 * error:
        yield f"The reward has not moved: reward/mean is {told}."
    elif moved < 0:
        yield f"The reward fell: reward/mean is {told}."


def _failed(run: Run) -> Iterator[str]:
    if (total := float(run.metrics.known("reward/failed").sum())) > 0:
        yield f"The reward function failed on {number(total)} answers (reward/failed), which count as wrong."


def _log_z(run: Run) -> Iterator[str]:
    gap, spread = _recent(run, "loss/log_z_gap"), _residual_spread(run)
    if gap > spread:
        yield (
            f"log Z is far from what the answers say: loss/log_z_gap is {number(gap)} over the last steps, more than "
            f"the residual's standard deviation of {number(spread)}."
        )


def _residual_spread(run: Run) -> float:
    variance = _recent(run, "loss/residual_sq") - _recent(run, "loss/residual") ** 2
    if not np.isnan(variance):
        return float(np.sqrt(max(variance, 0.0)))
    return (_recent(run, "loss/residual_p95") - _recent(run, "loss/residual_p05")) / 3.29  # of a normal distribution


def _grad_norm(run: Run) -> Iterator[str]:
    for name in ("policy/grad_norm", "critic/grad_norm"):
        values = run.metrics.values.get(name, np.empty(0))
        if not len(run.metrics.known(name)):
            continue
        middle, largest = float(np.nanmedian(values)), float(np.nanmax(values))
        if largest > GRAD_NORM * middle > 0:
            at = run.metrics.steps[int(np.nanargmax(values))]
            yield (
                f"{name} was {number(largest)} at step {at:.0f}, more than {GRAD_NORM:.0f} times its median of "
                f"{number(middle)}."
            )


def _distinct(run: Run) -> Iterator[str]:
    values = run.metrics.known("diversity/distinct_answers")
    if len(values) < LEAST_STEPS:
        return
    first, last = float(values[: len(values) // 10].mean()), float(values[-(len(values) // 10) :].mean())
    if last < DISTINCT * first:
        yield (
            f"Answers have become alike: diversity/distinct_answers fell from {number(first)} to {number(last)}, to "
            "below a quarter."
        )


def _staleness(run: Run) -> Iterator[str]:
    bound, values = run.settings.get("rollout.max_staleness"), run.metrics.known("mismatch/max_staleness")
    if isinstance(bound, int | float) and len(values) and values.max() > bound:
        yield (
            f"Answers were up to {number(float(values.max()))} steps old (mismatch/max_staleness), beyond "
            f"rollout.max_staleness = {bound}."
        )


CHECKS: tuple[Callable[[Run], Iterator[str]], ...] = (
    _skipped, _nulls, _mismatch, _sample_size, _cut_off, _uniform, _reward, _failed, _log_z, _grad_norm, _distinct,
    _staleness,
)  # fmt: skip


def _recent(run: Run, name: str) -> float:
    """Mean over the last tenth of a metric's numbers, ten at least; NaN, which passes no bound, where there is none."""
    values: Floats = run.metrics.known(name)
    return float(values[-max(len(values) // 10, 10) :].mean()) if len(values) else float("nan")
