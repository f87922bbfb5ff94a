"""The exact table: runs every row by the real trainer, keeps each result, and writes the page from all of them."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor, as_completed
from fnmatch import fnmatch
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from examples.exact import page, space, targets
from examples.exact.job import Trained, train
from examples.exact.rows import ROWS, Row, target
from flowrl_mega.monitor.plots import log_z_figure
from flowrl_mega.parallel.launch import rank_environment
from tools.benchmarks.workload import machine

FOLDER, TASK = Path("runs/exact"), Path("runs/exact/task")
RESULTS, PICTURE = Path("tools/benchmarks/results/exact.json"), Path("docs/images/log_z.png")
WATCH = 10  # steps between looks at the policy
PICTURED = {"plain-mlp": "without length normalisation", "norm-mlp": "with 1/|y|"}
# Figures in the results that are means of metrics over the last steps.
LOGGED = {
    "clip_fraction": "policy/clip_fraction",
    "max_abs_sum_d": "policy/max_abs_log_ratio",
    "log_z": "loss/log_z",
}
CURVES = ("step", "logged", "group", "watched", "best", "limit")


def make(seeds: int, jobs: int, only: str) -> None:
    """Run the rows whose name fits the pattern `only`, `jobs` at a time, and print their tables.

    With all rows ("*") also write the page, the picture and the results.
    """
    if not (TASK / "prompts.jsonl").exists():
        space.write_task(TASK)
    wanted = [(key, seed) for seed in range(seeds) for key in ROWS if fnmatch(key, only)]
    run_all([run for run in wanted if stored(*run) is None], jobs)
    results = {key: [result(key, seed) for k, seed in wanted if k == key] for key, _ in wanted}
    ref_logp = space.reference_logp(TASK)
    print("\n" + page.tables(results, ref_logp))
    if only == "*":
        write(results, ref_logp)


def run_all(runs: list[tuple[str, int]], jobs: int) -> None:
    """Each run in one of `jobs` processes; the first that fails ends the work, with its error."""
    if not runs:
        return
    with ProcessPoolExecutor(jobs, get_context("spawn"), initializer=become_a_rank) as pool:
        futures = {pool.submit(run_row, *run): run for run in runs}
        try:
            for done, future in enumerate(as_completed(futures), start=1):
                found = future.result()["figures"]
                key, seed = futures[future]
                said = f"KL {found['kl']:.4f}, E[r] {found['reward']:.4f}, {found['seconds']:.0f} s"
                print(f"{done}/{len(runs)} {key} (seed {seed}): {said}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def become_a_rank() -> None:
    """This process is a whole job of one rank, on one core."""
    os.environ.update(rank_environment(0, 1))
    torch.set_num_threads(1)


def run_row(key: str, seed: int) -> dict[str, Any]:
    """One run, measured; its result is in its file when this returns."""
    row, began = ROWS[key], time.process_time()  # of one core, whatever else the machine does
    sections = settings(row, seed)
    trained = train(TASK, file(key, seed).with_suffix(""), row.steps, sections, watch=WATCH)
    seconds = time.process_time() - began
    ref_logp = space.reference_logp(TASK)
    found: dict[str, Any] = {"row": key, "seed": seed, "settings": sections, "steps": row.steps}
    found["figures"] = figures(row, trained, ref_logp) | {"seconds": seconds}
    if row.beta is not None and row.steps:  # r_hat has no fixed log Z to look at
        found["log_z"] = log_z_curves(row, trained, ref_logp)
        found["figures"] |= log_z_figures(found["log_z"])
    partial = file(key, seed).with_suffix(".partial")
    partial.write_text(json.dumps(found))
    partial.rename(file(key, seed))
    return found


def settings(row: Row, seed: int) -> dict[str, Any]:
    return {**row.sections, "seed": seed}


def file(key: str, seed: int) -> Path:
    return FOLDER / f"seed_{seed}" / f"{key}.json"


def stored(key: str, seed: int) -> dict[str, Any] | None:
    """The result of this run; None where there is none, or one of other settings."""
    place, row = file(key, seed), ROWS[key]
    if not place.exists():
        return None
    found: dict[str, Any] = json.loads(place.read_text())
    same = found["settings"] == settings(row, seed) and found["steps"] == row.steps
    return found if same else None


def result(key: str, seed: int) -> dict[str, Any]:
    found = stored(key, seed)
    assert found is not None, f"{key} has run, but {file(key, seed)} does not say so"
    return found


def figures(row: Row, trained: Trained, ref_logp: Tensor) -> dict[str, float]:
    """What the trained policy is worth, means over the prompts."""
    log_p, _ = target(row.target, ref_logp)
    found = targets.figures(trained.logp, ref_logp)
    found["kl"] = float(targets.kl(trained.logp, log_p).mean())
    found["beta"] = float(targets.inverse_temperature(trained.logp, ref_logp, row.length_norm).mean())
    for name, metric in LOGGED.items():
        value = trained.logged(metric)
        if value is not None:
            found[name] = value
    return found


def log_z_curves(row: Row, trained: Trained, ref_logp: Tensor) -> dict[str, Any]:
    """log Z over training, means over the prompts.

    logged: the metric.  group: the step's answers' own estimate, mean of beta r - (log pi - log pi_ref) / s, which is
    log Z less the mean residual.  best: the exact best log Z of the policy after `watched` steps, whose answers the
    step after that trains on.  limit: the target's.
    """
    lines, beta = trained.metrics, row.beta
    assert beta is not None, "r_hat"
    log_z = target(row.target, ref_logp)[1]
    best = {n: targets.best_log_z(logp, ref_logp, beta, row.length_norm).mean() for n, logp in trained.watched.items()}
    return {
        "step": list(range(1, len(lines) + 1)),
        "logged": [line["loss/log_z"] for line in lines],
        "group": [line["loss/log_z"] - line["loss/residual"] for line in lines],
        "watched": list(best),
        "best": [float(value) for value in best.values()],
        "limit": float(log_z.mean()) if log_z is not None else None,
    }


def log_z_figures(curves: dict[str, Any]) -> dict[str, float]:
    """How far log Z and the group's estimate are from the exact best: means over the looks of the second half."""
    steps = len(curves["step"])
    pairs = [(n, best) for n, best in zip(curves["watched"], curves["best"], strict=True) if steps / 2 <= n < steps]
    if not pairs:
        return {}
    return {
        "log_z_error": sum(abs(curves["logged"][n] - best) for n, best in pairs) / len(pairs),
        "group_error": sum(abs(curves["group"][n] - best) for n, best in pairs) / len(pairs),
    }


def write(results: dict[str, list[dict[str, Any]]], ref_logp: Tensor) -> None:
    """The page's tables, the picture and the figures behind them."""
    header = machine("torch", "megatron-core", "transformers") | {"command": "make exact-table"}
    curves = {key: {name: rounded(results[key][0]["log_z"][name]) for name in CURVES} for key in PICTURED}
    rows = [
        {name: run[name] for name in ("row", "seed", "steps", "settings")}
        | {"figures": {name: value for name, value in run["figures"].items() if name != "seconds"}}  # the machine's
        for runs in results.values()
        for run in runs
    ]
    RESULTS.write_text(json.dumps({"machine": header, "rows": rows, "log_z": curves}) + "\n")
    log_z_figure({title: curves[key] for key, title in PICTURED.items()}, PICTURE)
    page.write(page.tables(results, ref_logp))
    print(f"\n{page.PAGE}, {PICTURE}, {RESULTS}")


def rounded(values: Any) -> Any:
    return [round(value, 4) for value in values] if isinstance(values, Iterable) else values
