"""A run folder in which a run is under way: a second launch says so and ends with 2, and nothing is written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from jobs import Job, write_config

from flowrl_mega import cli
from flowrl_mega.run_lock import FILE, run_lock

Capture = pytest.CaptureFixture[str]
BETAS = ["--vary", "objective.beta=1,2"]


@pytest.fixture
def config(model: Path, tmp_path: Path) -> str:
    return str(write_config(tmp_path, model))


@pytest.fixture
def under_way(tmp_path: Path, config: str) -> Iterator[Callable[[], bool]]:
    """This process holds the lock of the run folder, as the run of another would; gives whether all is as it was."""
    with run_lock(tmp_path / "run"):
        before = (tmp_path / "run" / FILE).read_text()
        yield lambda: os.listdir(tmp_path / "run") == [FILE] and (tmp_path / "run" / FILE).read_text() == before


@pytest.mark.parametrize("command", [["train"], ["train", "--resume=never"], ["ablate", *BETAS]])
def test_a_second_launch(command: list[str], config: str, under_way: Callable[[], bool], capsys: Capture) -> None:
    assert cli.main([command[0], config, *command[1:]]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("flowrl-mega: run_dir = ") and said.err.count("\n") == 1
    for part in ("a run is under way there", f"host {os.uname().nodename}, pid {os.getpid()}, since 20", "wait for it"):
        assert part in said.err
    assert under_way()


@pytest.mark.parametrize("command", [["train"], ["ablate", *BETAS]])
def test_a_dry_run_needs_no_lock(
    command: list[str], config: str, under_way: Callable[[], bool], capsys: Capture
) -> None:
    assert cli.main([command[0], config, *command[1:], "--dry-run"]) == 0
    assert under_way()


def test_another_folder_is_free(config: str, under_way: Callable[[], bool], tmp_path: Path, capsys: Capture) -> None:
    """What follows the lock is reached: the checks find another fault."""
    arguments = [f"--run_dir={tmp_path / 'run' / 'other'}", "--ops.backend=liger", "--parallel.tp=3"]
    assert cli.main(["train", config, *arguments]) == 2
    assert "under way" not in capsys.readouterr().err and under_way()


@pytest.mark.ranks
def test_ranks_of_a_launcher(config: str, under_way: Callable[[], bool], tmp_path: Path) -> None:
    """The first one says it, and no other waits for it."""
    job = Job(["train", config], tmp_path / "log")
    assert job.wait(timeout=120) == [2, 2]
    said = (tmp_path / "log").read_text()
    assert said.count("a run is under way there") == 1 and "Traceback" not in said, said
    assert under_way()


@pytest.mark.ranks
def test_a_job_that_launches_its_ranks_holds_it_for_them(config: str, tmp_path: Path) -> None:
    """They are told that everything is checked, and take none."""
    with run_lock(tmp_path / "run"):
        job = Job(["train", config, "--checked", "--steps=1"], tmp_path / "log")
        job.run(timeout=120)
        assert (tmp_path / "run" / FILE).exists() and (tmp_path / "run" / "metrics.jsonl").exists()
