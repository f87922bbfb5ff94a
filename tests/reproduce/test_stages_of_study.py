"""Stages: done once, gone on with after a failure, handed to SLURM as a chain. Commands are stand-ins here;
tests/integration/test_reproduce_slurm.py has the real ones."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from flowrl_mega.config import ConfigError
from flowrl_mega.reproduce import run as running
from flowrl_mega.reproduce.run import free_gb as running_free_gb
from flowrl_mega.reproduce.run import reproduce

REPO = Path(__file__).parents[2]
BASE = """
import json, pathlib, sys
out = pathlib.Path(sys.argv[1])
with open("log", "a") as log: print("base", file=log)
if pathlib.Path("broken").exists(): sys.exit(3)
out.mkdir(parents=True)
(out / "config.json").write_text("{}")
"""
DATA = """
import pathlib, sys
base, out = map(pathlib.Path, sys.argv[1:])
assert (base / "config.json").is_file()
with open("log", "a") as log: print("data", file=log)
out.mkdir(parents=True)
"""


@pytest.fixture
def path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    for name, code in (("base.py", BASE), ("data.py", DATA)):
        Path(name).write_text(code)
    tree = {
        "title": "t",
        "run_dir": "run",
        "base": {
            "command": f"{sys.executable} base.py {{out}}",
            "shape": {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 1, "ffn": 8, "vocab": 9},
        },
        "data": f"{sys.executable} data.py {{base}} {{out}}",
        "methods": {
            "A": {"config": str(REPO / "examples/smollm2.yaml"), "overrides": ["steps=2"]},
            "B": {"config": str(REPO / "examples/smollm2.yaml")},
        },
        "evaluate": {"benchmarks": ["reasoning_gym:gcd"], "k": 1},
        "hardware": {"sbatch_train": ["--nodes=2"], "sbatch_other": ["--gpus=1"]},
    }
    Path("study.yaml").write_text(yaml.safe_dump(tree))
    return "study.yaml"


def never() -> bool:
    return False


def run(path: str, *stages: str, **options: Any) -> int:
    settings = {"data": None, "dry_run": False, "as_jobs": False, "stop_requested": never} | options
    return reproduce(path, list(stages) or None, **settings)


def test_a_stage_is_done_once(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(path, "fetch", "data") == 0
    assert run(path, "fetch", "data") == 0
    assert Path("log").read_text().split() == ["base", "data"]
    assert run(path, dry_run=True) == 0
    said = capsys.readouterr().out
    assert "fetch     base         done: " in said and "train     A            flowrl-mega train" in said


def test_the_disk_is_looked_at_before_anything_is_fetched(
    path: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A model of 7.6e9 parameters, two bytes each: 15.2 GB; and checkpoints of two methods."""
    tree = yaml.safe_load(Path(path).read_text())
    tree["base"]["shape"] = {
        "layers": 28, "hidden": 3584, "heads": 28, "kv_heads": 4, "ffn": 18944, "vocab": 152064,
    }  # fmt: skip
    Path(path).write_text(yaml.safe_dump(tree))
    monkeypatch.setattr(running, "free_gb", lambda folder: 15.0)
    with pytest.raises(ConfigError, match=r"take 15\.2 GB, and 15\.0 GB are free; make room, or"):
        run(path, "fetch")
    assert not Path("log").exists()
    monkeypatch.setattr(running, "free_gb", lambda folder: 16.0)
    assert run(path, "fetch") == 0
    assert "the whole study takes about" in capsys.readouterr().err
    assert 0 < running_free_gb(Path("not/there/yet")) < 1e6


def test_a_failure_ends_it_and_is_gone_on_with(path: str, capsys: pytest.CaptureFixture[str]) -> None:
    Path("broken").touch()
    assert run(path, "fetch", "data") == 3
    assert "fetch base ended with 3; the same command goes on" in capsys.readouterr().err
    Path("broken").unlink()
    assert run(path, "fetch", "data") == 0
    assert Path("log").read_text().split() == ["base", "base", "data"]


def test_stopped_between_steps(path: str) -> None:
    assert run(path, "fetch", stop_requested=lambda: True) == 75
    assert not Path("log").exists()


def test_an_evaluation_before_its_model(path: str) -> None:
    with pytest.raises(ConfigError, match="run/base: is not there yet; run the stages before evaluate first"):
        run(path, "evaluate")
    with pytest.raises(ConfigError, match="step_2: is not there yet; run the stages before convert"):
        run(path, "convert")


SBATCH = """#!/bin/bash
printf '%s\\n' "$*" >> asked
echo "$(wc -l < asked);cluster"
"""


@pytest.fixture
def slurm(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    Path("bin").mkdir()
    Path("bin/sbatch").write_text(SBATCH)
    Path("bin/sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{Path('bin').resolve()}:{os.environ['PATH']}")
    Path("examples").symlink_to(REPO / "examples")


def test_a_chain_of_jobs(path: str, slurm: None) -> None:
    """Each stage after all jobs of those before it; a job for each run, by train.sbatch, and for each other stage."""
    assert run(path, "fetch") == 0
    assert run(path, as_jobs=True) == 0
    data, first, second, convert, evaluate, report = Path("asked").read_text().splitlines()
    assert "--dependency" not in data and "--gpus=1" in data and data.endswith("reproduce study.yaml --stage data")
    for line, steps in ((first, "--steps=2"), (second, "--run_dir=run/methods/B")):
        assert "--dependency=afterok:1 " in line and "--nodes=2 examples/slurm/train.sbatch" in line and steps in line
    assert "--dependency=afterok:1:2:3 " in convert and "--stage convert" in convert
    assert "--dependency=afterok:1:2:3:4 " in evaluate and "--stage evaluate" in evaluate
    assert "--dependency=afterok:1:2:3:4:5 " in report and "--stage report" in report


def test_what_a_compute_node_cannot_fetch_is_asked_for_before(path: str, slurm: None) -> None:
    with pytest.raises(ConfigError, match="base not fetched yet, .* run flowrl-mega reproduce study.yaml"):
        run(path, as_jobs=True)
    assert not Path("asked").exists()


def test_without_slurm(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError, match="no sbatch on this machine"):
        run(path, as_jobs=True)


def test_one_reproduction_at_a_time(path: str) -> None:
    from flowrl_mega.run_lock import run_lock

    with run_lock(Path("run")), pytest.raises(ConfigError, match="run"):
        run(path, "fetch")
    assert not Path("log").exists()
