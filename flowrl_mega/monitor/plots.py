"""Pictures of runs: pure functions from data to a PNG file.

`Table` is method -> numbers (the "methods" of summary.json); "<name>_std" next to a number draws its error bar.
`Curves` is method -> that method's rows of metrics.jsonl or evaluation.jsonl, each with "step".
"""

from __future__ import annotations

import math
import re
import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure

Table = Mapping[str, Mapping[str, Any]]
Records = Sequence[Mapping[str, Any]]
Curves = Mapping[str, Records]

# Okabe and Ito's palette: told apart with every kind of colour blindness. A method looks the same in every picture.
PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")
KNOWN = {"flowrl": PALETTE[0], "grpo": PALETTE[1], "grpo_kl": PALETTE[2], "ppo": PALETTE[3]}
START_COLOUR = "#333333"
MARKERS = "osD^vPX<>"
LABELS = {
    "start": "start",
    "flowrl": "FlowRL",
    "grpo": "GRPO",
    "grpo_kl": "GRPO + KL",
    "gspo": "GSPO",
    "ppo": "PPO",
    "reinforce_pp": "REINFORCE++",
    "gflowrl": "GFlowRL",
    "rloo": "RLOO",
    "cispo": "CISPO",
    "pass_rate": "pass rate",
    "distinct": "distinct right answers",
}
BEHIND_NUMBERS = {"facecolor": "white", "edgecolor": "none", "pad": 0.8}  # the start line may pass there
LINE_STYLES = ("-", "--", ":", "-.")
# The curves of an ablation that are drawn from metrics.jsonl: title -> metric.
TRAINING = {"reward": "reward/mean", "entropy": "policy/entropy"}


def reward_against_diversity(table: Table, path: str | Path) -> None:
    """Pass rate (up) against distinct right answers (right), a labelled point a method: top right is best.

    Methods named "family value" ("grpo_kl 0.01") or "family, variant" ("grpo, token mean") are one family: one colour.
    Those with values are a sweep, joined by a line in the table's order.
    """
    # The list of names takes its width and height from the axes, which need half of a wide picture.
    figure = _figure(6.4, 4.4) if len(table) <= len(MARKERS) else _figure(10.0, max(5.4, 0.28 * len(table)))
    axes = _plain(figure.add_subplot(), "")
    colours = _colours(table)
    for family in dict.fromkeys(map(_family, table)):
        sweep = [row for method, row in table.items() if method.startswith(f"{family} ")]
        points = [[row["distinct"] for row in sweep], [row["pass_rate"] for row in sweep]]
        axes.plot(*points, color=colours[family], linewidth=1.2, alpha=0.5)
    for place, (method, row) in enumerate(table.items()):
        axes.errorbar(
            row["distinct"],
            row["pass_rate"],
            xerr=row.get("distinct_std"),
            yerr=row.get("pass_rate_std"),
            fmt=MARKERS[place % len(MARKERS)],
            color=colours[_family(method)],
            ecolor=to_rgba(colours[_family(method)], 0.6),
            label=label(method),
            markersize=9,
            markeredgecolor="white",
            elinewidth=1.2,
            capsize=2,
        )
    axes.grid(alpha=0.25)
    axes.set(xlabel="distinct right answers", ylabel="pass rate")
    axes.margins(0.12)
    # Points can lie close together, names beside them would overlap: so they stand in a list, with the marker.
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.01, 0.5))
    _save(figure, path)


def quickstart_figure(summary: Mapping[str, Any], curves: Curves, path: str | Path) -> None:
    """Left: pass rate and distinct right answers of each method as bars, the start as a dashed line. Right: on held-out
    prompts, over time.

    `summary` is summary.json; `curves` rows have "step" and "pass_rate", "distinct" or both.
    """
    table: Table = summary["methods"]
    figure = _figure(9.6, 5.4)
    for line, name in enumerate(("pass_rate", "distinct")):
        bars = _plain(figure.add_subplot(2, 2, 2 * line + 1), f"{LABELS[name]} (dashed: start)")
        _bars(bars, table, name)
        over_time = _plain(figure.add_subplot(2, 2, 2 * line + 2, sharey=bars), f"{LABELS[name]}, held-out prompts")
        for method, rows in curves.items():
            steps, values = _points(rows, name)
            over_time.plot(steps, values, color=_colours(table)[_family(method)], label=label(method), linewidth=2)
        over_time.set_xlabel("step" if line else "")
    _legend_above(figure, figure.axes[1], len(curves))
    _save(figure, path)


def log_z_figure(panels: Mapping[str, Mapping[str, Any]], path: str | Path) -> None:
    """A panel each (title -> numbers): log Z as logged ("logged") and as the step's own answers estimate it ("group")
    at "step", the exact best one ("best") after "watched" steps, and where that ends ("limit", or None)."""
    figure = _figure(4.8 * len(panels), 3.6)
    for place, (title, values) in enumerate(panels.items(), start=1):
        axes = _plain(figure.add_subplot(1, len(panels), place), f"log Z {title}")
        axes.plot(values["step"], values["group"], ".", color=PALETTE[4], markersize=3, label="the group's estimate")
        axes.plot(values["step"], values["logged"], color=PALETTE[0], linewidth=2, label="learned, as logged")
        axes.plot(values["watched"], values["best"], "k+", markersize=6, label="exact best of the policy")
        if values["limit"] is not None:
            axes.axhline(values["limit"], color=START_COLOUR, linestyle="--", linewidth=1.2, label="of the target")
        axes.set_xlabel("step")
        low, high = min(values["best"]), max(values["best"])  # what is learned comes from further away
        axes.set_ylim(low - 0.75 * (high - low), high + 0.75 * (high - low))
    _legend_above(figure, figure.axes[0], 4)
    _save(figure, path)


def staleness_figure(curves: Mapping[str, Mapping[int, Sequence[Mapping[str, float]]]], path: str | Path) -> None:
    """Pass rate (left) and distinct right answers (right) against how old the answers were, a line a method.

    `curves` is method -> steps old -> the figures of its seeds; bars are ± a sample standard deviation. Ages stand at
    equal distances. A method without figures at an age has a gap there.
    """
    ages = sorted({age for of_method in curves.values() for age in of_method})
    figure = _figure(9.6, 4.4)
    for place, name in enumerate(("pass_rate", "distinct"), start=1):
        axes = _plain(figure.add_subplot(1, 2, place), LABELS[name])
        for number, (method, of_method) in enumerate(curves.items()):
            shift = 0.05 * (number - (len(curves) - 1) / 2)  # so that bars do not hide each other
            values = [[row[name] for row in of_method.get(age, [])] for age in ages]
            axes.errorbar(
                [at + shift for at in range(len(ages))],
                [statistics.mean(seeds) if seeds else math.nan for seeds in values],
                yerr=[statistics.stdev(seeds) if len(seeds) > 1 else 0.0 for seeds in values],
                fmt=MARKERS[number % len(MARKERS)] + LINE_STYLES[number // len(PALETTE) % len(LINE_STYLES)],
                color=PALETTE[number % len(PALETTE)],
                label=method,
                markersize=7,
                markeredgecolor="white",
                linewidth=1.6,
                elinewidth=1.2,
                capsize=2,
            )
        axes.set_xticks(range(len(ages)), [str(age) for age in ages])
        axes.set_xlabel("age of the answers, steps")
        axes.grid(axis="y", alpha=0.25)
        axes.set_ylim(bottom=0)
    _legend_above(figure, figure.axes[0], 3)
    _save(figure, path)


def ablation_figure(cells: Mapping[str, Sequence[tuple[Records, Records]]], path: str | Path) -> None:
    """Learning curves of an ablation: reward, entropy and each held-out figure. A cell is a line, the mean of its
    seeds, in a band of ± a sample standard deviation.

    `cells` is cell -> for each seed its records of steps and those of evaluations.
    """
    held_out = dict.fromkeys(n for seeds in cells.values() for _, rows in seeds for row in rows for n in row)
    panels = [(0, name, metric) for name, metric in TRAINING.items()]
    panels += [(1, name, name) for name in held_out if name != "step"]
    columns = min(len(panels), 3)
    lines = math.ceil(len(panels) / columns)
    name_width = (max(map(len, cells)) + 6) / 12  # inches, with the line before it
    width = max(4.0 * columns, name_width)
    legend_columns = min(len(cells), int(width / name_width), 6)
    figure = _figure(width, 2.7 * lines + 0.25 + 0.21 * math.ceil(len(cells) / legend_columns))
    for place, (kind, name, key) in enumerate(panels, start=1):
        title = LABELS.get(name, name.replace("_", " "))
        axes = _plain(figure.add_subplot(lines, columns, place), f"held-out {title}" if kind else title)
        axes.set_xlabel("step")
        for number, (cell, seeds) in enumerate(cells.items()):
            style = LINE_STYLES[number // len(PALETTE) % len(LINE_STYLES)]
            curves = [_points(records[kind], key) for records in seeds]
            _band(axes, curves, cell, PALETTE[number % len(PALETTE)], style)
    _legend_above(figure, figure.axes[0], legend_columns)
    _save(figure, path)


def _band(axes: Axes, curves: Sequence[tuple[list[int], list[float]]], label: str, colour: str, style: str) -> None:
    """Mean and standard deviation, at each step, of the curves that have it; many steps are smoothed first."""
    at: dict[int, list[float]] = {}
    for steps, values in curves:
        for step, value in zip(steps, _running_mean(values, len(values) // 40), strict=True):
            at.setdefault(step, []).append(value)
    steps = sorted(at)
    mean = [statistics.fmean(at[step]) for step in steps]
    std = [statistics.stdev(at[step]) if len(at[step]) > 1 else 0.0 for step in steps]
    axes.plot(steps, mean, color=colour, linestyle=style, linewidth=2, label=label)
    if any(std):
        low, high = ([m + sign * s for m, s in zip(mean, std, strict=True)] for sign in (-1, 1))
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)


def _bars(axes: Axes, table: Table, name: str) -> None:
    """A bar a method with its number on top; the start is a dashed line behind them."""
    methods = [method for method in table if method != "start"]
    values = [table[method][name] for method in methods]
    bars = axes.bar(
        [label(method) for method in methods],
        values,
        width=0.6,
        color=[_colours(table)[_family(method)] for method in methods],
        yerr=[table[method].get(f"{name}_std", 0.0) for method in methods] if _has_std(table, name) else None,
        capsize=3,
    )
    axes.bar_label(bars, fmt="%.3g" if max(values) >= 1.5 else "%.2f", padding=3, fontsize=9, bbox=BEHIND_NUMBERS)
    axes.axhline(table["start"][name], color=START_COLOUR, linestyle="--", linewidth=1.2)
    axes.set_ylim(0, 1.18 * max([*values, table["start"][name]]))


def _has_std(table: Table, name: str) -> bool:
    return any(f"{name}_std" in row for row in table.values())


def _points(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and values of the rows that have a number (a non-finite one was written as null) under `name`."""
    kept = [(row["step"], float(row[name])) for row in rows if row.get(name) is not None]
    return [step for step, _ in kept], [value for _, value in kept]


def _running_mean(values: Sequence[float], reach: int) -> list[float]:
    """Mean of the values within `reach` places of each point (fewer at both ends)."""
    spans = [values[max(0, place - reach) : place + reach + 1] for place in range(len(values))]
    return [sum(span) / len(span) for span in spans]


def _colours(methods: Iterable[str]) -> dict[str, str]:
    """A colour a family: fixed for the known ones, the rest of the palette in turn for others."""
    fixed = {**KNOWN, "start": START_COLOUR}
    free = [colour for colour in PALETTE if colour not in KNOWN.values()]
    others = [family for family in dict.fromkeys(map(_family, methods)) if family not in fixed]
    return {**fixed, **{family: free[place % len(free)] for place, family in enumerate(others)}}


def _family(method: str) -> str:
    """ "grpo" of "grpo, token mean", and "grpo_kl" of "grpo_kl 0.05"."""
    return re.split("[ ,]", method, maxsplit=1)[0]


def label(method: str) -> str:
    """A method's name as it is shown."""
    family = _family(method)
    return LABELS.get(family, family) + method[len(family) :]


def _figure(width: float, height: float) -> Figure:
    """A figure of inches that knows no screen: it works the same on a machine without a display."""
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def _plain(axes: Axes, title: str) -> Axes:
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(title, fontsize=10.5, loc="left")
    axes.tick_params(labelsize=9)
    return axes


def _legend_above(figure: Figure, axes: Axes, columns: int) -> None:
    handles, labels = axes.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=min(columns, 6), frameon=False)


def _save(figure: Figure, path: str | Path) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
