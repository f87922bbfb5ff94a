"""Tables of the page: text and numbers, each as it is to be shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeGuard

from flowrl_mega.report.methods import Method
from flowrl_mega.report.records import Columns
from flowrl_mega.report.run import Run
from flowrl_mega.report.text import number

COUNTED = {"cut_off": "cut off", "no_answer": "no answer", "time_out": "time-out", "failed": "failed"}


@dataclass
class Table:
    caption: str
    head: list[str]
    rows: list[list[str]]  # the first cell of a row is its heading
    note: str = ""


def of_differences(methods: Sequence[Method]) -> Table | None:
    """The settings in which methods differ, a row a method; None where there is one method."""
    names = list(dict.fromkeys(name for method in methods for name in method.varied))
    if len(methods) < 2:
        return None
    rows = []
    for method in methods:
        seeds = ", ".join(str(run.settings.get("seed", "?")) for run in method.runs)
        cells = [_setting(method.varied[name]) if name in method.varied else "–" for name in names]
        rows.append([method.label, seeds, *cells])
    return Table("Settings that differ", ["method", "seeds", *names], rows, "" if names else "No setting differs.")


def of_cost(runs: Sequence[Run], names: Sequence[str]) -> Table:
    """What each run ran on, and what it took."""
    head = ["run", "steps", "hours", "GPU hours", "started", "device", "ranks", "GPUs", "versions", "commit"]
    rows = []
    for run, name in zip(runs, names, strict=True):
        last = run.starts[-1] if run.starts else {}
        versions = last.get("versions")
        steps = number(int(run.metrics.steps[-1])) if len(run.metrics.steps) else "–"
        starts = (
            f"{run.starts[0].get('at', '–')}{f', {len(run.starts)} starts' if len(run.starts) > 1 else ''}"
            if last
            else "–"
        )
        rows.append(
            [name, steps, f"{run.hours:.3g}" if run.hours else "–", number(run.gpu_hours), starts]
            + [number(last.get(key)) for key in ("device", "ranks", "gpus")]
            + [", ".join(f"{k} {v}" for k, v in versions.items() if v) if isinstance(versions, dict) else "–"]
            + [number(last.get("commit"))]
        )
    known = [at for at in range(len(head)) if at < 3 or any(row[at] != "–" for row in rows)]
    note = "" if any(run.starts for run in runs) else "Versions and hardware are not known: there is no run.json."
    return Table("Cost", [head[at] for at in known], [[row[at] for at in known] for row in rows], note)


def numbers_of(metrics: Columns, evaluation: Columns) -> Table:
    rows = []
    for source, columns in (("", metrics), ("evaluation: ", evaluation)):
        for name in columns.values:
            of = columns.known(name)
            figures = (of[0], of[-1], of.min(), of.max(), of.mean())
            rows.append([f"{source}{name}", *(number(float(value)) for value in figures)])
    return Table("All metrics", ["metric", "first", "last", "smallest", "largest", "mean"], rows)


def of_scores(record: Mapping[str, Any]) -> Table:
    """scores.json: shares in percent, in brackets the 95% interval over problems."""
    benchmarks = {name: of for name, of in record["benchmarks"].items() if isinstance(of, dict)}
    figures = list(
        dict.fromkeys(key for of in benchmarks.values() for key in of if "@" in key and not key.endswith("/interval"))
    )
    figures += [name for name in ("rating", "percentile") if any(name in of for of in benchmarks.values())]
    rows = []
    for name, of in benchmarks.items():
        counts = [f"{number(of.get(key))} of {number(of.get('answers'))}" if of.get(key) else "0" for key in COUNTED]
        cells = [_score(of, figure) for figure in figures]
        tokens = of.get("mean_tokens")
        rows.append([str(of.get("title", name)), number(of.get("problems")), *cells, *counts, number(tokens)])
    ended = record.get("ended")
    note = "Shares in percent; in brackets the 95% interval over problems." + (f" Evaluated {ended}." if ended else "")
    return Table("Scores", ["benchmark", "problems", *figures, *COUNTED.values(), "mean tokens"], rows, note)


def of_study(record: Mapping[str, Any]) -> Table:
    """report.json: in each cell ours with its interval, the published number, and the difference."""
    every = {name: of for name, of in record["rows"].items() if isinstance(of, dict)}
    columns = list(dict.fromkeys(column for of in every.values() for column in of))
    rows = [[name, *(_cell(of.get(column)) for column in columns)] for name, of in every.items()]
    note = ["Each cell: ours (95% interval over problems); published; difference."]
    study, training = record.get("study"), record.get("training")
    published = study.get("published") if isinstance(study, dict) else None
    note += [f"Published: {published.get('source')}."] if isinstance(published, dict) else []
    for name, of in training.items() if isinstance(training, dict) else ():
        if isinstance(of, dict):
            note.append(f"{name}: {number(of.get('steps'))} steps, {number(of.get('hours'))} hours.")
    return Table("Study", ["model", *columns], rows, " ".join([*note, f"Commit {record.get('commit') or 'unknown'}."]))


def _setting(value: Any) -> str:
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)


def _score(of: Mapping[str, Any], figure: str) -> str:
    value, ends = of.get(figure), of.get(f"{figure}/interval")
    if not isinstance(value, int | float):
        return "–"
    if "@" not in figure:
        return f"{value:.2f}"
    return f"{100 * value:.2f}" + (f" ({100 * ends[0]:.1f} to {100 * ends[1]:.1f})" if _is_interval(ends) else "")


def _cell(of: Any) -> str:
    """As report.md has it."""
    if not isinstance(of, dict):
        return ""
    ours, ends, published, difference = (of.get(key) for key in ("ours", "interval", "published", "difference"))
    interval = f" ({ends[0]:.1f} to {ends[1]:.1f})" if _is_interval(ends) else ""
    said = f"{ours:.2f}{interval}" if isinstance(ours, int | float) else "not known"
    said += f"; {published:.2f}" if isinstance(published, int | float) else ""
    return said + (f"; {difference:+.2f}" if isinstance(difference, int | float) else "")


def _is_interval(ends: Any) -> TypeGuard[list[float]]:
    return isinstance(ends, list) and len(ends) == 2 and all(isinstance(end, int | float) for end in ends)
