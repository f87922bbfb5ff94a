"""What stands in each section of the page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any

import numpy as np

from flowrl_mega.report.curves import POINTS, curve
from flowrl_mega.report.distributions import Distributions, Prompt
from flowrl_mega.report.figures import Line, Painter, Plot
from flowrl_mega.report.findings import findings
from flowrl_mega.report.methods import Method, methods_of
from flowrl_mega.report.records import Columns, Floats
from flowrl_mega.report.run import Run, Sample
from flowrl_mega.report.tables import Table, numbers_of, of_cost, of_differences, of_scores, of_study

MOST_RUNS = 6  # of which pictures and samples are shown one by one
MOST_PROMPTS, MOST_ANSWERS = 6, 12
FEWER_POINTS = 60
MAIN = (
    "reward/mean", "reward/right", "loss/policy", "loss/critic", "policy/entropy", "rollout/response_length",
    "policy/grad_norm", "policy/kl_to_ref",
)  # fmt: skip
# Heading -> names, or the start of names ("mismatch/").
HEALTH = {
    "Saturation": ("policy/clip_fraction", "loss/gap_clipped", "policy/weight_sample_size", "loss/flow_weight"),
    "Staleness and mismatch": ("mismatch/", "rollout/stale_dropped"),
    "Diversity": ("diversity/",),
    "Distance to the target": ("target/",),
}
LOG_Z = ("loss/log_z", "loss/log_z_gap", "loss/log_z_error")
RESIDUAL = ("loss/residual", "loss/residual_sq")
QUANTILES = {f"0.{digits}": f"loss/residual_p{digits:0<2}" for digits in ("05", "25", "5", "75", "95")}


@dataclass
class OfRun:
    """What is shown of one run alone."""

    name: str
    run: Run
    findings: list[str]
    numbers: Table | None
    log_z: list[Plot] = field(default_factory=list)
    residual: list[Plot] = field(default_factory=list)
    prompts: list[Prompt] = field(default_factory=list)
    samples: list[tuple[str, list[Sample]]] = field(default_factory=list)  # summary -> answers to one prompt
    scores: Table | None = None
    study: Table | None = None


@dataclass
class Page:
    title: str
    lines: list[Line]
    methods: list[Method]
    runs: list[OfRun]
    differences: Table | None
    cost: Table
    curves: list[Plot]
    evaluation: list[Plot]
    log_z: list[Plot]
    residual: list[Plot]
    health: list[tuple[str, list[Plot]]]
    others: list[tuple[str, list[Plot]]]
    constant: list[tuple[str, float]]
    notes: list[tuple[str, list[str]]]  # what could not be read, and the runs of which
    band: str  # what the bands of the curves are


class Builder:
    """Draws the curves of all methods, each metric once."""

    def __init__(self, runs: Sequence[Run]) -> None:
        trained = [run for run in runs if run.has_trained]
        self.methods, self.painter, self.drawn = methods_of(trained), Painter(), set[str]()
        self.lines = self.painter.lines([method.label for method in self.methods])
        columns = [run.metrics for run in trained]
        self.names = sorted({name for each in columns for name in each.values})
        self.constant = {name: value for name in self.names if (value := _only_value(columns, name)) is not None}
        # Many points of several curves hide each other, and their line styles.
        self.points = POINTS if len(self.methods) < 2 else FEWER_POINTS

    def plots(self, names: Sequence[str], constant: bool = False) -> list[Plot]:
        """Of the metrics with these names, or that start with a name that ends in a slash; constant ones if asked."""
        found = []
        for wanted in names:
            for name in [n for n in self.names if n == wanted or (wanted.endswith("/") and n.startswith(wanted))]:
                if name not in self.drawn and (constant or name not in self.constant):
                    self.drawn.add(name)
                    found.append(self._plot(name, "metrics"))
        return found

    def evaluation(self) -> list[Plot]:
        names = dict.fromkeys(n for method in self.methods for run in method.runs for n in run.evaluation.values)
        return [self._plot(name, "evaluation") for name in names]

    def others(self) -> list[tuple[str, list[Plot]]]:
        left = [name for name in self.names if name not in self.drawn | self.constant.keys()]
        groups = groupby(left, key=lambda name: name.partition("/")[0])
        return [(group, self.plots(list(names))) for group, names in groups]

    def _plot(self, name: str, source: str) -> Plot:
        pairs = zip(self.lines, self.methods, strict=True)
        having = [
            (line, curve([getattr(run, source) for run in method.runs], name, self.points)) for line, method in pairs
        ]
        return self.painter.curves(name, [(line, of) for line, of in having if of])


def page_of(runs: Sequence[Run]) -> Page:
    builder = Builder(runs)
    names = _names(runs)
    curves, evaluation = builder.plots(MAIN, constant=True), builder.evaluation()
    log_z, residual = builder.plots(LOG_Z), builder.plots(RESIDUAL)
    health = [(title, builder.plots(wanted)) for title, wanted in HEALTH.items()]
    builder.drawn.update(QUANTILES.values())  # drawn as bands
    return Page(
        title=names[0] if len(runs) == 1 else f"{names[0]} and {len(runs) - 1} more",
        lines=builder.lines,
        methods=builder.methods,
        runs=[_of_run(run, name, builder.painter, at) for at, (run, name) in enumerate(zip(runs, names, strict=True))],
        differences=of_differences(builder.methods),
        cost=of_cost(runs, names),
        curves=curves,
        evaluation=evaluation,
        log_z=log_z,
        residual=residual,
        health=[(title, plots) for title, plots in health if plots],
        others=builder.others(),
        constant=[(name, value) for name, value in builder.constant.items() if name not in builder.drawn],
        notes=_notes(runs, names),
        band=_band(builder.methods),
    )


def _of_run(run: Run, name: str, painter: Painter, at: int) -> OfRun:
    found = OfRun(name, run, findings(run), numbers_of(run.metrics, run.evaluation) if run.has_trained else None)
    found.scores = of_scores(run.scores) if run.scores else None
    found.study = of_study(run.study) if run.study else None
    if at < MOST_RUNS:
        of = run.distributions
        if of.log_z:
            few = _some(of.log_z, 8)
            found.log_z = [
                painter.calibration("Each prompt's log Z", few),
                painter.log_z("Mean over prompts", _some(of.log_z, FEWER_POINTS)),
            ]
        found.residual = _residuals(run, painter)
        found.prompts = _prompts(of)
        found.samples = _samples(run)
    return found


def _residuals(run: Run, painter: Painter) -> list[Plot]:
    of, plots = run.distributions, list[Plot]()
    if of.histograms:
        plots.append(painter.histograms("Residuals at some steps", _some(of.histograms, 4)))
    steps: Floats = np.array(of.quantile_steps, dtype=np.float64)
    quantiles = {name: np.array(values) for name, values in of.quantiles.items()}
    if all(name in run.metrics.values for name in QUANTILES.values()):  # of every step
        found = {name: curve([run.metrics], metric) for name, metric in QUANTILES.items()}
        kept = {name: each for name, each in found.items() if each}
        if len({len(each.steps) for each in kept.values()}) == 1:
            steps, quantiles = kept["0.5"].steps, {name: each.mean for name, each in kept.items()}
    if len(steps):
        chosen = _some(range(len(steps)), POINTS)
        bands = {name: values[chosen] for name, values in quantiles.items()}
        plots.append(painter.bands("Quantiles of the residual", steps[chosen], bands))
    return plots


def _prompts(of: Distributions) -> list[Prompt]:
    return [Prompt(text[:1000], answers) for text, answers in of.prompts[:MOST_PROMPTS]]


def _samples(run: Run) -> list[tuple[str, list[Sample]]]:
    """By step and prompt, the last step first. The first row may be of a step whose other rows were not read."""
    groups = []
    for (step, prompt), rows in groupby(run.samples, key=lambda sample: (sample.step, sample.prompt)):
        answers = list(rows)
        rewards = [of.reward for of in answers if isinstance(of.reward, int | float)]
        mean = f", mean score {sum(rewards) / len(rewards):.3g}" if rewards else ""
        start = "" if step is None else f"step {step}: "
        groups.append((f"{start}{prompt[:80]} ({len(answers)} answer{'s'[: len(answers) > 1]}{mean})", answers))
    return groups[::-1]


def _only_value(columns: Sequence[Columns], name: str) -> float | None:
    """The one value, to six digits, that a metric has at all steps of all runs; None where there are more."""
    every = np.concatenate([each.known(name) for each in columns])
    return float(every[0]) if np.ptp(every) <= 1e-6 * np.abs(every).max() else None


def _names(runs: Sequence[Run]) -> list[str]:
    """The folders' names, with as many of those above them as set them apart."""
    parts = [run.path.resolve().parts for run in runs]
    for depth in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-depth:]) for part in parts]
        if len(set(names)) == len(names):
            break
    return names


def _notes(runs: Sequence[Run], names: Sequence[str]) -> list[tuple[str, list[str]]]:
    found: dict[str, list[str]] = {}
    for run, name in zip(runs, names, strict=True):
        if run.notes:
            found.setdefault(" ".join(run.notes), []).append(name)
    return list(found.items())


def _some(items: Sequence[Any], most: int) -> Any:
    """At most so many of them, at equal distances, with the first and the last one."""
    if len(items) <= most:
        return list(items)
    return [items[round(at)] for at in np.linspace(0, len(items) - 1, most)]


def _band(methods: Sequence[Method]) -> str:
    several = any(len(method.runs) > 1 for method in methods)
    alone = any(len(method.runs) == 1 for method in methods)
    said = ["A line is the mean of a method's seeds, its band a standard deviation to each side"] * several
    said += [
        "A line of a single run is a mean over neighbouring steps where there are many, its band all their values"
    ] * alone
    return ". ".join(said) + "." if said else ""
