"""The main job: GRPO, GRPO with KL and FlowRL from one warm start, at equal samples and equal updates.

RUN_DIR/seed_K/METHOD is an ordinary run folder. A quick start begins anew: what an earlier one wrote there goes.
"""

from __future__ import annotations

import json
import shutil
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_file import load_config
from flowrl_mega.launched import started_by_launcher
from flowrl_mega.monitor.run_folder import EVALUATION, RunFolder
from flowrl_mega.quickstart.trials import CONFIG, Trial, gpus, run_trials
from flowrl_mega.run_lock import run_lock
from flowrl_mega.settings import flat

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
FIXED = {
    "seed": "give --seeds N for seeds 0 to N - 1",
    "model.path": "each seed's is the warm start that is trained first",
    "objective.name": "the methods are GRPO, GRPO with KL and FlowRL; `flowrl-mega ablate` compares others",
    "critic": "none of its methods has one",
    "data.task": "the table counts sums; `flowrl-mega train` has other tasks",
}
TRIALS, SUMMARY, PICTURE = "trials.json", "summary.json", "quickstart.png"
DONE, TERMINATED = 0, 143


def quickstart(overrides: Sequence[str], seeds: int, stop_requested: Callable[[], bool]) -> int:
    """Train every method with seeds 0 to `seeds` - 1, then write table, picture and page; returns the exit code.

    `overrides` change the settings of quickstart.yaml for every method; those of the objective FlowRL's.
    """
    config = checked(overrides, seeds)
    if started_by_launcher():
        raise ConfigError("quickstart starts its ranks itself; start it once, without torchrun or srun")
    folder = Path(config.run_dir)
    with run_lock(folder):
        clear(folder)
        return _run(folder, list(range(seeds)), list(overrides), stop_requested)


def checked(overrides: Sequence[str], seeds: int) -> Config:
    """The settings with `overrides`. ConfigError if those are wrong, for any method, or not for the user to change."""
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    config = load_config(CONFIG, list(overrides))
    before, after = flat(load_config(CONFIG).dump()), flat(config.dump())
    for name in [name for name in {**before, **after} if before.get(name) != after.get(name)]:
        if why := next((why for fixed, why in FIXED.items() if f"{name}.".startswith(f"{fixed}.")), None):
            raise ConfigError(f"{name} = {after.get(name)!r}: cannot be changed in the quick start; {why}")
    if config.data.held_out is None:
        raise ConfigError("data.held_out = None: the table has figures of held-out prompts; give a share (0.1)")
    for trial in trials_of(Path(config.run_dir), 0, overrides):
        try:
            trial.config()
        except ConfigError as error:
            raise ConfigError(f"method {trial.name}: {error}") from None
    from flowrl_mega import objectives  # with torch, which takes seconds

    objectives.build(config.objective)
    return config


def clear(folder: Path) -> None:
    """Remove what an earlier quick start wrote. ConfigError where the runs there are another command's."""
    from flowrl_mega.faults import FOLDER as FAULTS
    from flowrl_mega.report.command import PAGE

    runs = list(folder.glob("seed_*"))
    if runs and not (folder / TRIALS).is_file():
        raise ConfigError(f"run_dir = {str(folder)!r}: {runs[0].name} is of another command; choose another run_dir")
    for run in runs:
        shutil.rmtree(run)
    shutil.rmtree(folder / FAULTS, ignore_errors=True)
    for name in (SUMMARY, PICTURE, PAGE, TRIALS):  # the last one says whose the runs are
        (folder / name).unlink(missing_ok=True)


def trials_of(folder: Path, seed: int, overrides: Sequence[str]) -> list[Trial]:
    """The warm start and every method; a method's own objective wins over the user's."""
    return [Trial(f"{folder}/seed_{seed}", seed, name, [*overrides, *own]) for name, own in METHODS.items()]


def _run(folder: Path, seeds: list[int], overrides: list[str], stop_requested: Callable[[], bool]) -> int:
    import torch  # seconds, so only after the settings have been looked at

    from flowrl_mega.monitor.plots import quickstart_figure
    from flowrl_mega.report.command import PAGE, end_with_page

    began = time.perf_counter()
    results = []
    for seed in seeds:
        if stop_requested():
            return TERMINATED
        trials = trials_of(folder, seed, overrides)
        if code := run_trials(trials, folder / TRIALS):
            return code
        results.append({trial.name: trial.figures for trial in trials})
    summary: dict[str, Any] = {
        "methods": summarise(results),
        "seeds": seeds,
        "seconds": {"job": time.perf_counter() - began},
        "machine": {"torch": torch.__version__, "gpus": gpus()},
    }
    (folder / SUMMARY).write_text(json.dumps(summary, indent=1))
    curves = {method: learning_curve(folder / "seed_0" / method) for method in METHODS if method != "start"}
    quickstart_figure(summary, curves, folder / PICTURE)
    print("\n" + table(summary["methods"]))
    runs = [folder / f"seed_{seed}" / name for seed in seeds for name in METHODS if name != "start"]
    end_with_page(runs, folder / PAGE)
    print(f"\n{summary['seconds']['job']:.0f} s; {folder}/{SUMMARY}, {PICTURE}, {PAGE}; every run is beside them")
    return DONE


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
    return RunFolder(run).read(EVALUATION)
