"""Data are loaded and tokenized once a process: by the checks, and then kept for the plan and the run."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from jobs import Job, write_config

from flowrl_mega import cli

TASK = """
import os

class Counted:
    def __init__(self, log):
        self.log = log

    def rows(self):
        with open(self.log, "a") as file:
            print(os.getpid(), file=file)
        return [{"prompt": f"{n}:", "total": n, "terms": 2} for n in range(10, 20)]
"""


@pytest.fixture
def config(model: Path, tmp_path: Path) -> Path:
    (tmp_path / "task.py").write_text(TASK)
    data = {"task": f"{tmp_path}/task.py:Counted", "task_args": {"log": str(tmp_path / "loads")}, "held_out": 0.2}
    parallel = {"tp": 1, "timeout_s": 60}
    return write_config(tmp_path, model, data=data, parallel=parallel, steps=1, evaluation={}, checkpoint={})


def loads(folder: Path) -> list[int]:
    """How often each process loaded the data."""
    return sorted(Counter((folder / "loads").read_text().split()).values())


def test_a_dry_run(config: Path, tmp_path: Path) -> None:
    """Its checks of rewards and lengths, and its description, read the same rows."""
    assert cli.main(["train", str(config), "--dry-run"]) == 0
    assert loads(tmp_path) == [1]


@pytest.mark.ranks
def test_a_run_of_one_rank(config: Path, tmp_path: Path) -> None:
    Job(["train", str(config)], tmp_path / "log", world=1).run()
    assert loads(tmp_path) == [1]


@pytest.mark.ranks
def test_a_run_that_starts_its_ranks(config: Path, tmp_path: Path) -> None:
    """The parent checks, and each of the two ranks trains."""
    command = [sys.executable, "-m", "flowrl_mega.cli", "train", str(config), "--parallel.tp=2"]
    subprocess.run(command, check=True, timeout=240)
    assert loads(tmp_path) == [1, 1, 1]
