"""The `reproduce` command: runs what is not done yet of a study's stages, or says what would run."""

from __future__ import annotations

import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from flowrl_mega.config import ConfigError
from flowrl_mega.launched import started_by_launcher
from flowrl_mega.reproduce.plan import GB, check_disk, describe
from flowrl_mega.reproduce.stages import DONE, STOPPED, steps
from flowrl_mega.reproduce.study import read_study
from flowrl_mega.reproduce.submit import submit
from flowrl_mega.run_lock import run_lock


def reproduce(
    path: str,
    stages: list[str] | None,
    data: str | None,
    dry_run: bool,
    as_jobs: bool,
    stop_requested: Callable[[], bool],
) -> int:
    """Returns the exit code: that of the first step which did not succeed."""
    study = read_study(path)
    if started_by_launcher():
        raise ConfigError("reproduce starts the ranks of its steps itself; start it once, without torchrun or srun")
    chosen = [step for step in steps(study, data) if not stages or step.stage in stages]
    if dry_run:
        print(describe(study))
        for step in chosen:
            print(f"{step.stage:<9} {step.name:<12} {'done: ' if step.is_done() else ''}{step.words}")
        return DONE
    if as_jobs:
        submit(study, path, chosen)
        return DONE
    if any(step.stage == "fetch" and not step.is_done() for step in chosen):
        line = check_disk(study, free_gb(Path(study.run_dir)))
        if line:
            print(f"reproduce: {line}", file=sys.stderr, flush=True)
    with run_lock(Path(study.run_dir)):
        for number, step in enumerate(chosen, start=1):
            if stop_requested():
                return STOPPED
            if step.is_done():
                continue
            print(f"reproduce: {number} of {len(chosen)}, {step.stage} {step.name}", file=sys.stderr, flush=True)
            if code := step.run(stop_requested):
                print(
                    f"reproduce: {step.stage} {step.name} ended with {code}; the same command goes on", file=sys.stderr
                )
                return code
    return DONE


def free_gb(folder: Path) -> float:
    """On the disk of the folder, or of the nearest one above it that is there."""
    there = next(place for place in (folder.resolve(), *folder.resolve().parents) if place.exists())
    return shutil.disk_usage(there).free / GB
