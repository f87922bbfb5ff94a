"""The results of an ablation as one table and one plot: mean and spread over the seeds."""

from __future__ import annotations

import json
import math
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

Records = Sequence[Mapping[str, Any]]
TRAINING = {"reward": "reward/mean", "entropy": "policy/entropy", "response_length": "rollout/response_length"}
HELD_OUT = "held_out_"
EXPLAINED = (
    "reward, entropy (nats a token) and response length are means over the last tenth of the steps, "
    "held-out figures those of the last evaluation, seconds those of all steps"
)


def write_report(
    folder: Path,
    seeds: Sequence[int],
    settings: Mapping[str, Mapping[str, Any]],
    records: Mapping[str, Mapping[int, tuple[Records, Records]]],
    failed: Mapping[str, Mapping[int, str]],
) -> None:
    """Write ablation.md, ablation.json and, where a run is finished, ablation.png into `folder`; print the table.

    All three mappings have every cell. `settings`: the varied ones; `records`: seed -> (metrics.jsonl,
    evaluation.jsonl) of finished runs; `failed`: seed -> why.
    """
    summary = {
        cell: {
            "settings": varied,
            **summarise({seed: figures(*both) for seed, both in records[cell].items()}),
            "failed": failed[cell],
        }
        for cell, varied in settings.items()
    }
    text = table(summary, seeds)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "ablation.json").write_text(json.dumps({"seeds": seeds, "cells": summary}, indent=1, default=str))
    (folder / "ablation.md").write_text(text)
    print(f"\n{text}\n{folder}: ablation.md, ablation.json", end="")
    curves = {cell: list(by_seed.values()) for cell, by_seed in records.items() if by_seed}
    if curves:
        from flowrl_mega.monitor.plots import ablation_figure  # matplotlib takes a second

        ablation_figure(curves, folder / "ablation.png")
        print(", ablation.png", end="")
    print(flush=True)


def figures(metrics: Records, evaluation: Records) -> dict[str, float]:
    """A run's figures from its metrics.jsonl and evaluation.jsonl, as EXPLAINED defines them.

    A null (a number that was not finite) is left out of its mean; a figure with nothing but nulls is left out.
    """
    last_tenth = metrics[-math.ceil(len(metrics) / 10) :]
    found: dict[str, float] = {}
    for name, metric in TRAINING.items():
        values = [record[metric] for record in last_tenth if record.get(metric) is not None]
        if values:
            found[name] = statistics.fmean(values)
    for name, value in (evaluation[-1] if evaluation else {}).items():
        if name != "step" and value is not None:
            found[HELD_OUT + name] = value
    return found | {"seconds": math.fsum(record["perf/step_seconds"] for record in metrics)}


def summarise(runs: Mapping[int, Mapping[str, float]]) -> dict[str, Any]:
    """{"runs": seed -> figures, "mean": figures, "std": figures}.

    "std" is the sample standard deviation; it has the figures that at least two seeds have.
    """
    columns: dict[str, list[float]] = {}
    for found in runs.values():
        for name, value in found.items():
            columns.setdefault(name, []).append(value)
    return {
        "runs": {seed: dict(found) for seed, found in runs.items()},
        "mean": {name: statistics.fmean(values) for name, values in columns.items()},
        "std": {name: statistics.stdev(values) for name, values in columns.items() if len(values) > 1},
    }


def table(summary: Mapping[str, Mapping[str, Any]], seeds: Sequence[int]) -> str:
    """A Markdown table that also reads well as plain text: one line per cell, then the failed runs.

    `summary` is cell -> the result of `summarise`, with "failed": seed -> why.
    """
    names = list(dict.fromkeys(name for row in summary.values() for name in row["mean"]))
    names.sort(key=lambda name: (name == "seconds", name.startswith(HELD_OUT)))  # stable: else as they came
    lines = [["cell", "seeds", *(heading(name) for name in names)]]
    digits = {name: _decimals([row["mean"].get(name, 0.0) for row in summary.values()]) for name in names}
    for cell, row in summary.items():
        done = len(row["runs"])
        count = str(done) if done == len(seeds) else f"{done} of {len(seeds)}"
        lines.append([cell, count, *(_entry(row, name, digits[name]) for name in names)])
    widths = [max(len(line[column]) for line in lines) for column in range(len(lines[0]))]
    lines.insert(1, ["-" * width for width in widths])
    text = "".join(f"| {' | '.join(map(str.ljust, line, widths))} |\n" for line in lines)
    text += f"\nMean ± sample standard deviation over the seeds {', '.join(map(str, seeds))}; {EXPLAINED}.\n"
    failed = [f"- {cell}, seed {seed}: {why}" for cell, row in summary.items() for seed, why in row["failed"].items()]
    return text + ("\nFailed:\n\n" + "\n".join(failed) + "\n" if failed else "")


def heading(name: str) -> str:
    return name.replace(HELD_OUT, "held-out ").replace("_", " ")


def _entry(row: Mapping[str, Any], name: str, decimals: int) -> str:
    if name not in row["mean"]:
        return "-"
    spread = f" ± {row['std'][name]:.{decimals}f}" if name in row["std"] else ""
    return f"{row['mean'][name]:.{decimals}f}{spread}"


def _decimals(means: Sequence[float]) -> int:
    """Decimals that show three digits of the column's largest number."""
    largest = max(map(abs, means))
    return min(max(2 - math.floor(math.log10(largest)), 0), 6) if largest else 3
