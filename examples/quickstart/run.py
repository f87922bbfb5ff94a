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

import torch

from flowrl_mega.monitor.plots import quickstart_figure
from flowrl_mega.parallel.launch import launch

FOLDER = Path("runs/quickstart")
METHODS = {
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


def main() -> int:
    parser = argparse.ArgumentParser(description="The quick start's main job.")
    parser.add_argument("--seeds", type=int, default=1)
    seeds = list(range(parser.parse_args().seeds))
    began = time.perf_counter()
    shutil.rmtree(FOLDER, ignore_errors=True)
    results = []
    for seed in seeds:
        code = run_trials(FOLDER / f"seed_{seed}", seed, METHODS)
        if code:
            return code
        results.append(json.loads((FOLDER / f"seed_{seed}" / "results.json").read_text()))
    summary = {
        "methods": summarise(results),
        "seeds": seeds,
        "seconds": {"job": time.perf_counter() - began},
        "machine": {"torch": torch.__version__, "gpus": gpus()},
    }
    (FOLDER / "summary.json").write_text(json.dumps(summary, indent=1))
    curves = {method: learning_curve(FOLDER / "seed_0" / method) for method in METHODS}
    quickstart_figure(summary, curves, FOLDER / "quickstart.png")
    print("\n" + table(summary["methods"]))
    print(f"\n{summary['seconds']['job']:.0f} s; {FOLDER}/summary.json and quickstart.png; every run is beside them")
    return 0


def run_trials(folder: Path, seed: int, trials: Mapping[str, list[str]], timeout_s: float = 3600) -> int:
    """Start the ranks on these trials; two ranks with tp = 2, but one on a machine with a single GPU."""
    ranks = 1 if gpus() == 1 else 2
    folder.mkdir(parents=True, exist_ok=True)
    job = folder / "trials.json"
    content = {"dir": str(folder), "seed": seed, "trials": dict(trials), "overrides": [f"parallel.tp={ranks}"]}
    job.write_text(json.dumps(content, indent=1))
    return launch([sys.executable, "-m", "examples.quickstart.job", str(job)], ranks, timeout_s=timeout_s)


def gpus() -> int:
    # Where there is none, Megatron needs device_count() to say 1 all the same (parallel/cuda_is_cpu.py).
    return torch.cuda.device_count() if torch.cuda.is_available() else 0


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
    lines = ["".join(["method".ljust(10), *(title.rjust(16) for title in COLUMNS.values())])]
    for method, row in methods.items():
        cells = [_cell(row, name).rjust(16) for name in COLUMNS]
        lines.append("".join([method.ljust(10), *cells]))
    return "\n".join(lines)


def _cell(row: Mapping[str, Any], name: str) -> str:
    digits = 0 if name == "seconds" else 2 if name in ("distinct", "entropy", "kl") else 3
    spread = f" ±{row[f'{name}_std']:.{digits}f}" if f"{name}_std" in row else ""
    return f"{row[name]:.{digits}f}{spread}"


def learning_curve(run: Path) -> list[dict[str, Any]]:
    """Exact figures on the held-out prompts during training, from evaluation.jsonl."""
    return [json.loads(line) for line in (run / "evaluation.jsonl").read_text().splitlines()]


if __name__ == "__main__":
    sys.exit(main())
