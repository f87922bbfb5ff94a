"""The main job: GRPO, GRPO with KL and FlowRL from one warm start, at equal samples and equal updates.

python -m examples.quickstart.run [--seeds 3]     writes runs/quickstart/{summary.json,quickstart.png}
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from examples.quickstart.trials import Trial, gpus, run_trials

FOLDER = Path("runs/quickstart")
METHODS: dict[str, list[str]] = {
    "start": [],
    "grpo": ["objective={name: grpo}"],
    "grpo_kl": ["objective={name: grpo, kl_coef: 0.05}"],
    "flowrl": [],
}
COLUMNS = {
    "pass_rate": "pass rate",
    "pass@64": "pass@64",
    "distinct": "distinct@64",
    "coverage": "coverage",
    "held_out_pass_rate": "held-out pass",
    "entropy": "entropy",
    "kl": "KL to start",
    "seconds": "seconds",
}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.quickstart.run", description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=1)
    return parser


def main() -> int:
    seeds = list(range(parser().parse_args().seeds))
    import torch  # seconds, so only after the arguments have been looked at

    from flowrl_mega.monitor.plots import quickstart_figure
    from flowrl_mega.report.command import PAGE, end_with_page

    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    results = []
    for seed in seeds:
        trials = [Trial(f"{FOLDER}/seed_{seed}", seed, name, overrides) for name, overrides in METHODS.items()]
        if code := run_trials(trials, FOLDER / "trials.json"):
            return code
        results.append({trial.name: trial.figures for trial in trials})
    summary = {
        "methods": summarise(results),
        "seeds": seeds,
        "seconds": {"job": time.perf_counter() - began},
        "machine": {"torch": torch.__version__, "gpus": gpus()},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1))
    curves = {method: learning_curve(FOLDER / "seed_0" / method) for method in METHODS if method != "start"}
    quickstart_figure(summary, curves, FOLDER / "quickstart.png")
    print("\n" + table(summary["methods"]))
    runs = [FOLDER / f"seed_{seed}" / name for seed in seeds for name in METHODS if name != "start"]
    end_with_page(runs, FOLDER / PAGE)
    print(
        f"\n{summary['seconds']['job']:.0f} s; {FOLDER}/summary.json, quickstart.png, {PAGE}; every run is beside them"
    )
    return 0


def summarise(results: list[dict[str, dict[str, float]]]) -> dict[str, dict[str, float]]:
    """Means over the seeds, and "NAME_std" (sample standard deviation) where there are several."""
    summary: dict[str, dict[str, float]] = {}
    for method in results[0]:
        rows = [result[method] for result in results]
        summary[method] = {name: statistics.mean(row[name] for row in rows) for name in rows[0]}
        if len(rows) > 1:
            summary[method] |= {f"{name}_std": statistics.stdev(row[name] for row in rows) for name in rows[0]}
    return summary


def table(methods: Mapping[str, Mapping[str, Any]]) -> str:
    """The figures as text, a method a line."""
    width = max(10, *(len(method) + 2 for method in methods))
    lines = ["".join(["method".ljust(width), *(title.rjust(16) for title in COLUMNS.values())])]
    for method, row in methods.items():
        cells = [cell(row, name).rjust(16) for name in COLUMNS]
        lines.append("".join([method.ljust(width), *cells]))
    return "\n".join(lines)


def cell(row: Mapping[str, Any], name: str) -> str:
    """A figure of a summary as text, with its spread."""
    digits = 0 if name == "seconds" else 2 if name in ("distinct", "held_out_distinct", "entropy", "kl") else 3
    spread = f" ±{row[f'{name}_std']:.{digits}f}" if f"{name}_std" in row else ""
    return f"{row[name]:.{digits}f}{spread}"


def learning_curve(run: Path) -> list[dict[str, Any]]:
    """Exact figures on the held-out prompts during training, from evaluation.jsonl."""
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
