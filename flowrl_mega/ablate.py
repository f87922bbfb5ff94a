"""The `ablate` command: a grid of settings x seeds, a `flowrl-mega train` each, and what they came to.

RUN_DIR/CELL/seed_K is a run folder like any. Its config.yaml is written first and is what its `train` reads, so that
a grid that goes on later, or after CONFIG was edited, cannot mix two settings in one cell.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_file import load_config
from flowrl_mega.monitor.ablation import figures, summarise, table
from flowrl_mega.monitor.run_folder import CONFIG, EVALUATION, METRICS, RunFolder

DONE, STOPPED = 0, 75
LONGEST_NAME = 120  # of a cell: file systems allow 255 bytes
Choice = dict[str, Any]  # dotted names of settings and their values


@dataclass(frozen=True)
class Cell:
    """One choice of the varied settings; `config` has the first seed, and the grid's run_dir."""

    name: str
    settings: Choice
    config: Config


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
        """Refuse a folder with a run of other settings; where it lies may have changed."""
        path = self.folder / CONFIG
        if not path.exists():
            if self.steps_done():
                raise ConfigError(f"{self.folder}: holds a run without its {CONFIG}; choose another run_dir")
            return
        try:
            there = load_config(path)
        except ConfigError as error:
            raise ConfigError(f"{path}: {error}; choose another run_dir, or remove {self.folder}") from None
        old, new = _flat(there.dump()), _flat(self.config.dump())
        names = [name for name in {**old, **new} if name != "run_dir" and old.get(name) != new.get(name)]
        if names:
            changes = "; ".join(f"{name} was {old.get(name)!r} and is {new.get(name)!r}" for name in names[:3])
            more = f"; and {len(names) - 3} more" if len(names) > 3 else ""
            raise ConfigError(
                f"{self.folder}: holds a run of other settings: {changes}{more}; choose another run_dir, or remove it"
            )

    def records(self) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
        """Those of the training steps and those of the evaluations."""
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
    """Run what is not done yet, then write table and plot of all that is; returns the exit code.

    0: all runs are finished; 75: stopped on request, to go on when started again; else the first failed run's code.
    """
    axes = read_axes(vary, overrides)
    if seeds < 1:
        raise ConfigError(f"--seeds {seeds}: must be at least 1")
    cells = grid(path, overrides, axes)
    runs = [run_of(cell, seed) for seed in range(seeds) for cell in cells]  # all cells once before any of them twice
    for run in runs:
        run.check_folder()
    to_do = [run for run in runs if not run.finished()]
    check({run.cell: run.config for run in to_do})
    if dry_run:
        print("\n".join(f"{run.folder}: {run.steps_done()} of {run.config.steps} steps" for run in runs))
        return DONE
    failed, code = _run_all(to_do, stop_requested)
    report(Path(cells[0].config.run_dir), cells, runs, failed)
    return code


def read_axes(vary: Sequence[str], overrides: Sequence[str] = ()) -> list[list[Choice]]:
    """What each `--vary` says; no setting may be given twice, not in `overrides` either."""
    axes = [read_axis(text) for text in vary]
    given = [override.lstrip("-").partition("=")[0] for override in overrides]
    for name in [name for axis in axes for name in axis[0]]:
        if name in given:
            raise ConfigError(f"--vary {name}: this setting is given twice; say it once")
        if name in ("seed", "run_dir"):
            fix = "give --seeds N, and the first with --seed=K" if name == "seed" else "each run gets its own"
            raise ConfigError(f"--vary {name}: cannot be varied; {fix}")
        given.append(name)
    return axes


def read_axis(text: str) -> list[Choice]:
    """`NAME=V1,V2,...` or `NAME=[V1, V2, ...]`, read as YAML; `NAME+NAME=[[V, V], ...]`: they change together."""
    name, found, values = text.partition("=")
    form = "write --vary NAME=V1,V2,... or, for values with commas, --vary 'NAME=[V1, V2, ...]'"
    names = tuple(name.split("+"))
    if not found or not all(names):
        raise ConfigError(f"--vary {text}: not a setting and its values; {form}")
    try:
        read = yaml.safe_load(f"[{values}]")
    except yaml.YAMLError:
        read = None
    if read and len(read) == 1 and isinstance(read[0], list):
        (read,) = read
    if not read or values.rstrip().endswith(","):
        raise ConfigError(f"--vary {text}: its values are empty or not YAML; {form}")
    if len(names) == 1:
        return [{name: value} for value in read]
    for value in read:
        if not isinstance(value, list) or len(value) != len(names):
            raise ConfigError(f"--vary {text}: {value!r} is no list of {len(names)} values, one for each of {name}")
    return [dict(zip(names, value, strict=True)) for value in read]


def grid(path: str, overrides: Sequence[str], axes: Sequence[Sequence[Choice]]) -> list[Cell]:
    """The product of all axes, the last one fastest, as checked settings; no two cells may be the same."""
    choices = [{name: part[name] for part in parts for name in part} for parts in itertools.product(*axes)]
    cells: list[Cell] = []
    for name, settings in zip(cell_names(choices), choices, strict=True):
        varied = [f"{setting}={json.dumps(value, default=str)}" for setting, value in settings.items()]
        try:
            config = load_config(path, [*overrides, *varied])
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None
        for cell in cells:
            if cell.config == config:
                raise ConfigError(f"--vary: cells {cell.name} and {name} have the same settings; leave one out")
        cells.append(Cell(name, settings, config))
    return cells


def cell_names(choices: Sequence[Choice]) -> list[str]:
    """A folder name for each cell: "weight=paper,lr=1e-6"; whole dotted names where the last parts are the same.

    A name that is too long, or another cell's too once odd characters are replaced, ends in a hash of its settings.
    """
    settings = list(choices[0])
    last = [setting.rpartition(".")[2] for setting in settings]
    short = {setting: part if last.count(part) == 1 else setting for setting, part in zip(settings, last, strict=True)}
    names = [",".join(f"{short[name]}={_word(value)}" for name, value in choice.items()) for choice in choices]
    return [
        name if len(name) <= LONGEST_NAME and names.count(name) == 1 else f"{name[:LONGEST_NAME]}-{_hash(choice)}"
        for name, choice in zip(names, choices, strict=True)
    ]


def _word(value: Any) -> str:
    """A value as part of a file name; a mapping's `name` goes without its key, and {} means the defaults."""
    if isinstance(value, Mapping):
        return "-".join(_word(v) if key == "name" else f"{key}={_word(v)}" for key, v in value.items()) or "default"
    if isinstance(value, list):
        return "-".join(map(_word, value))
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-") if isinstance(value, str) else text


def _hash(choice: Choice) -> str:
    return hashlib.sha256(json.dumps(choice, default=str).encode()).hexdigest()[:8]


def run_of(cell: Cell, place: int) -> Run:
    """The cell's run with the `place`-th seed."""
    config = cell.config
    seed = config.seed + place
    folder = Path(config.run_dir) / cell.name / f"seed_{seed}"
    return Run(cell.name, config.model_copy(update={"seed": seed, "run_dir": str(folder)}))


def check(configs: Mapping[str, Config]) -> None:
    """Everything that can be wrong with the input of these cells, before the first run starts."""
    if not configs:
        return
    from flowrl_mega import preflight  # with torch and megatron: a wrong name in --vary was told before
    from flowrl_mega.parallel.launch import started_by_launcher
    from flowrl_mega.parallel.layout import world_size

    if started_by_launcher():
        raise ConfigError("ablate starts the ranks of its runs itself; start it once, without torchrun or srun")
    for name, config in configs.items():
        try:
            preflight.check(preflight.Inputs(config), world_size(config.parallel), "auto", checkpoint=None)
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None


def _run_all(runs: Sequence[Run], stop_requested: Callable[[], bool]) -> tuple[dict[Path, str], int]:
    """One after the other; a failed run does not keep the others from running.

    Returns why runs failed, by folder, and the exit code.
    """
    if not runs:
        return {}, DONE
    from flowrl_mega.parallel.launch import launch_job

    failed: dict[Path, str] = {}
    first_code = DONE
    for place, run in enumerate(runs, start=1):
        if stop_requested():
            return failed, STOPPED
        print(f"run {place} of {len(runs)}: {run.folder}", flush=True)
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
    """ablation.json, ablation.md and ablation.png in `folder`, of the runs that are finished; prints the table."""
    records = {
        cell.name: {run.config.seed: run.records() for run in runs if run.cell == cell.name and run.finished()}
        for cell in cells
    }
    summary = {
        cell.name: {
            "settings": cell.settings,
            **summarise({seed: figures(*both) for seed, both in records[cell.name].items()}),
            "failed": {
                run.config.seed: failed[run.folder] for run in runs if run.cell == cell.name and run.folder in failed
            },
        }
        for cell in cells
    }
    seeds = list(dict.fromkeys(run.config.seed for run in runs))
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


def _flat(tree: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """Dotted name -> value."""
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{place}{name}.") if isinstance(value, Mapping) and value else {f"{place}{name}": value}
    return flat
