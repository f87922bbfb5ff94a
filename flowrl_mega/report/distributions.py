"""distributions.jsonl: residuals, log Z and the answers of some prompts, each every so many steps."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from flowrl_mega.report.records import Floats, numbers


class Histogram(NamedTuple):
    """`density`: the share of answers in each bin, divided by its width."""

    step: int
    edges: Floats
    density: Floats


class LogZ(NamedTuple):
    """By prompt of one step; NaN where it is not known."""

    step: int
    logged: Floats
    group: Floats
    exact: Floats


class Answer(NamedTuple):
    text: str
    count: Any
    reward: Any
    target: float | None
    empirical: float | None


class Prompt(NamedTuple):
    text: str
    answers: list[Answer]  # the most probable first

    @property
    def largest(self) -> float:
        """Of all shares: bars are drawn against it."""
        return max((share for of in self.answers for share in (of.target, of.empirical) if share), default=1.0)


@dataclass
class Distributions:
    histograms: list[Histogram] = field(default_factory=list)
    quantile_steps: list[int] = field(default_factory=list)
    quantiles: dict[str, list[float]] = field(default_factory=dict)  # "0.05" -> a number for each of the steps
    log_z: list[LogZ] = field(default_factory=list)
    last_step: int | None = None  # that of `prompts`
    prompts: list[Prompt] = field(default_factory=list)

    def __bool__(self) -> bool:
        return bool(self.histograms or self.quantile_steps or self.log_z or self.prompts)


QUANTILES = ("0.05", "0.25", "0.5", "0.75", "0.95")


def read_distributions(records: Iterable[dict[str, Any]]) -> Distributions:
    """What the page shows of them; a part that is not as it should be is left out."""
    found = Distributions()
    for record in records:
        step = record.get("step")
        if type(step) is not int:
            continue
        _add_residual(found, step, _object(record.get("residual")))
        of = _object(record.get("log_z"))
        logged, group, exact = (numbers(of.get(name)) for name in ("logged", "group", "exact"))
        if len(logged) and len(logged) == len(group):
            found.log_z.append(LogZ(step, logged, group, exact if len(exact) == len(logged) else logged * np.nan))
        if isinstance(record.get("prompts"), list):
            last = record["prompts"]  # only these are shown: they are turned into prompts once, at the end
            found.last_step = step
    if found.last_step is not None:
        found.prompts = [_prompt(prompt) for prompt in last if isinstance(prompt, dict)]
    return found


def _add_residual(found: Distributions, step: int, residual: dict[str, Any]) -> None:
    edges, counts = numbers(residual.get("edges")), numbers(residual.get("counts"))
    if len(counts) and len(edges) == len(counts) + 1 and np.all(np.diff(edges) > 0) and np.nansum(counts) > 0:
        found.histograms.append(Histogram(step, edges, counts / np.nansum(counts) / np.diff(edges)))
    quantiles = _object(residual.get("quantiles"))
    values = numbers([quantiles.get(name) for name in QUANTILES])
    if not np.isnan(values).any():
        found.quantile_steps.append(step)
        for name, value in zip(QUANTILES, values, strict=True):
            found.quantiles.setdefault(name, []).append(float(value))


def _prompt(prompt: dict[str, Any]) -> Prompt:
    rows = prompt.get("answers")
    answers = [
        Answer(
            str(row.get("text", "")),
            row.get("count"),
            row.get("reward"),
            _share(row.get("target")),
            _share(row.get("empirical")),
        )
        for row in (rows if isinstance(rows, list) else [])
        if isinstance(row, dict)
    ]
    answers.sort(key=lambda answer: -max(answer.target or 0.0, answer.empirical or 0.0))
    return Prompt(str(prompt.get("prompt", "")), answers)


def _share(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and 0 <= value <= 1 else None


def _object(value: Any) -> dict[str, Any]:
    return value if isinstance(value, dict) else {}
