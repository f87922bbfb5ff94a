"""Runs the cells of a grid, each with every seed, as `flowrl-mega train` processes one after the other.

RUN_DIR/CELL/seed_K is an ordinary run folder. Its config.yaml is written first and is what its `train` reads, so that
a grid that goes on later, or after CONFIG was edited, cannot mix two settings in one cell.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_mega.ablation.grid import Cell, grid, read_axes
from flowrl_mega.ablation.report import Records, write_report
from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_file import load_config
from flowrl_mega.launched import started_by_launcher
from flowrl_mega.monitor.run_folder import CONFIG, EVALUATION, METRICS, RunFolder
from flowrl_mega.run_lock import run_lock
from flowrl_mega.settings import flat

DONE, STOPPED = 0, 75


@dataclass(frozen=True)
class Run:
    """A cell with one seed."""

    cell: str
    config: Config

    @property
    def folder(self) -> Path:
        return Path(self.config.run_dir)

    def steps_done(self) -> int:
        records = self._read(METRICS)
        return records[-1]["step"] if records else 0

    def finished(self) -> bool:
        """Whether the last step's records are there; a checkpoint need not be (checkpoint.at_end)."""
        evaluated = not self.config.evaluation.every or any(
            record["step"] == self.config.steps for record in self._read(EVALUATION)
        )
        return evaluated and self.steps_done() == self.config.steps

    def check_folder(self) -> None:
        """ConfigError if the folder holds a run of other settings; only run_dir may have changed."""
        path = self.folder / CONFIG
        if not path.exists():
            if self.steps_done():
                raise ConfigError(f"{self.folder}: holds a run without its {CONFIG}; choose another run_dir")
            return
        try:
            there = load_config(path)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; choose another run_dir, or remove {self.folder}") from None
        old, new = flat(there.dump()), flat(self.config.dump())
        names = [name for name in {**old, **new} if name != "run_dir" and old.get(name) != new.get(name)]
        if names:
            changes = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names[:3])
            more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(
                f"{self.folder}: holds a run of other settings: {changes}{more}; choose another run_dir, or remove it"
            )

    def records(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """(records of the training steps, records of the evaluations)."""
        return self._read(METRICS), self._read(EVALUATION)

    def _read(self, name: str) -> list[dict[str, Any]]:
        return RunFolder(self.folder).read(name) if self.folder.is_dir() else []


def ablate(
    path: str,
    overrides: Sequence[str],
    vary: Sequence[str],
    seeds: int,
    dry_run: bool,
    stop_requested: Callable[[], bool],
) -> int:
    """Run what is not finished yet, then write the table and the plot of all finished runs; returns the exit code.

    0: all runs are finished; 75: stopped on request, to go on when started again; else the first failed run's code.
    """
    axes = read_axes(vary, overrides)
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    cells = grid(path, overrides, axes)
    if started_by_launcher():
        raise ConfigError("ablate starts the ranks of its runs itself; start it once, without torchrun or srun")
    runs = [run_of(cell, i) for i in range(seeds) for cell in cells]  # all cells once before any of them twice
    folder = Path(cells[0].config.run_dir)
    with nullcontext() if dry_run else run_lock(folder):  # each run takes the lock of its own folder, too
        for run in runs:
            run.check_folder()
        to_do = [run for run in runs if not run.finished()]
        check({run.cell: run.config for run in to_do})
        if dry_run:
            print("\n".join(f"{run.folder}: {run.steps_done()} of {run.config.steps} steps" for run in runs))
            return DONE
        failed, code = _run_all(to_do, stop_requested)
        report(folder, cells, runs, failed)
    return code


def run_of(cell: Cell, seed_index: int) -> Run:
    """The cell's run with seed config.seed + `seed_index`."""
    config = cell.config
    seed = config.seed + seed_index
    folder = Path(config.run_dir) / cell.name / f"seed_{seed}"
    return Run(cell.name, config.model_copy(update={"seed": seed, "run_dir": str(folder)}))


def check(configs: Mapping[str, Config]) -> None:
    """Check the input of these cells, by name, before the first run starts. ConfigError names the cell."""
    if not configs:
        return
    from flowrl_mega import preflight  # with torch and megatron: a wrong name in --vary was told before

    for name, config in configs.items():
        try:
            preflight.check(preflight.Inputs(config), preflight.ranks_to_start(config), "auto", checkpoint=None)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None


def _run_all(runs: Sequence[Run], stop_requested: Callable[[], bool]) -> tuple[dict[Path, str], int]:
    """Run one after the other; a failed run does not keep the others from running.

    Returns (run folder -> why it failed, exit code).
    """
    if not runs:
        return {}, DONE
    from flowrl_mega.parallel.launch import launch_job

    failed: dict[Path, str] = {}
    first_code = DONE
    for number, run in enumerate(runs, start=1):
        if stop_requested():
            return failed, STOPPED
        print(f"run {number} of {len(runs)}: {run.folder}", flush=True)
        settings = RunFolder(run.folder)
        settings.write_config(run.config.dump())
        command = [sys.executable, "-m", "flowrl_mega.cli", "train", str(run.folder / CONFIG)]
        code = launch_job(command, stop_requested)
        if code == STOPPED or stop_requested():
            return failed, STOPPED
        if code or not run.finished():
            failed[run.folder] = f"exit code {code}" if code else f"no record of step {run.config.steps}"
            first_code = first_code or code or 1
    return failed, first_code


def report(folder: Path, cells: Sequence[Cell], runs: Sequence[Run], failed: Mapping[Path, str]) -> None:
    """Write ablation.md, ablation.json and ablation.png into `folder` from the finished runs, and print the table.

    `failed`: run folder -> why.
    """
    settings = {cell.name: cell.settings for cell in cells}
    records: dict[str, dict[int, tuple[Records, Records]]] = {name: {} for name in settings}
    reasons: dict[str, dict[int, str]] = {name: {} for name in settings}
    for run in runs:
        if run.finished():
            records[run.cell][run.config.seed] = run.records()
        if run.folder in failed:
            reasons[run.cell][run.config.seed] = failed[run.folder]
    seeds = list(dict.fromkeys(run.config.seed for run in runs))
    write_report(folder, seeds, settings, records, reasons)
    done = [run.folder for run in runs if run.finished()]
    if done:
        from flowrl_mega.report.command import PAGE, end_with_page  # matplotlib takes a second

        end_with_page(done, folder / PAGE)
