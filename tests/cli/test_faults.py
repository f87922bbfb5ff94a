"""A fault on one rank: the terminal shows it once, and every rank ends with its exit code within seconds."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from failures import MESSAGE
from jobs import Job, write_config

from flowrl_mega.parallel.launch import launch, reserve_port

pytestmark = pytest.mark.slow

# One rank without a model, which starts in the time that torch needs: two collectives, and a fault between them.
RANK = f"""
import os, signal, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
import failures
import torch, torch.distributed as dist
from flowrl_mega.faults import run_as_rank

signal.signal(signal.SIGTERM, lambda *_: None)  # as in training, where it asks for a checkpoint

def run():
    dist.init_process_group("gloo")
    failures.fail()
    for _ in range(2):
        dist.all_reduce(torch.ones(1))
        dist.all_gather_object([None] * dist.get_world_size(), 0)
    return 0

sys.exit(run_as_rank(run, Path("run")))
"""


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of ranks without a model: their script, and their run folder `run`."""
    (tmp_path / "rank.py").write_text(RANK)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, sys.path)))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    return tmp_path


@pytest.fixture
def srun() -> Iterator[list[dict[str, str]]]:
    """The environments of two tasks of srun, which has only exit codes and stderr; rank 0 hosts the store."""
    with reserve_port() as reserved:
        common = {
            "SLURM_JOB_ID": "4711", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_TASKS_PER_NODE": "2",
            "SLURM_STEP_NODELIST": "here", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(reserved.getsockname()[1]),
            "GLOO_SOCKET_IFNAME": "lo",
        }  # fmt: skip
        yield [common | {"SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)} for rank in range(2)]


def ended(job: Job) -> tuple[list[int | None], str, float]:
    """Exit codes and output of the ranks, and the seconds between the ends of the first and the last one."""
    while all(rank.exitcode is None for rank in job.ranks):
        time.sleep(0.02)
    first = time.monotonic()
    return job.wait(), job.log.read_text(), time.monotonic() - first


def config(folder: Path, model: Path) -> str:
    """A run whose collectives would wait for ten minutes."""
    return str(write_config(folder, model, parallel={"tp": 2, "timeout_s": 600}, evaluation={"every": 0}))


@pytest.mark.parametrize(
    ("launcher", "failures", "code"),
    [
        ("ours", "0:config", 2), ("ours", "1:config", 2), ("ours", "0:config 1:hang", 2),
        ("srun", "1:run", 70), ("srun", "0:run 1:run", 70), ("srun", "0:hang 1:run", 70),
    ],
)  # fmt: skip
def test_one_message_and_one_exit_code(
    launcher: str, failures: str, code: int, model: Path, tmp_path: Path, srun: list[dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Whichever rank fails, also where the other one would never come to a collective that fails, and where both do."""
    monkeypatch.setenv("FAILURES", failures)
    environments = [{**task, "FAILURES": failures} for task in srun] if launcher == "srun" else None
    log = tmp_path / "log"
    codes, said, seconds = ended(
        Job(["train", config(tmp_path, model)], log, before="failures:fail", environments=environments)
    )
    assert codes == [code, code], said
    assert said.count(MESSAGE) == 1 and f"flowrl-mega: {MESSAGE}\n" in said and "Traceback" not in said, said
    assert seconds < 10
    assert not (tmp_path / "run" / "run.lock").exists(), "also where rank 0 hung and was ended"


@pytest.mark.parametrize("failures", ["0:crash", "1:crash", "1:crash 0:hang"])
def test_a_traceback_is_that_of_the_rank_that_failed(
    failures: str, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FAILURES", failures)
    codes, said, _ = ended(Job(["train", config(tmp_path, model)], tmp_path / "log", before="failures:fail"))
    bad = int(failures[0])
    assert codes == [1, 1], said
    assert said.count("Traceback") == 1 and f"flowrl-mega: rank {bad} failed:\nTraceback" in said, said
    assert said.endswith("ValueError: boom\nand more\n")
    logs = {path.name: path.read_text() for path in (tmp_path / "run" / "faults").iterdir()}
    assert "ValueError: boom" in logs.pop(f"rank_{bad}.log")
    assert "hang" in failures or "Traceback" in logs[f"rank_{1 - bad}.log"], "the collective that lost its peer"


@pytest.mark.parametrize(
    ("world", "overrides", "words"),
    [
        (3, [], "parallel.tp = 2: does not divide the 3 ranks started; start 2"),
        (1, [], "parallel.tp = 2: does not divide the 1 ranks started; start 2"),
        (1, ["--parallel.pp=2"], "parallel.tp x parallel.pp = 2 x 2: does not divide the 1 ranks started; start 4"),
        (2, ["--parallel.dp=2"], "2 x 2: 2 ranks were started; start 4"),
    ],
)
def test_what_all_ranks_find_before_the_start(
    world: int, overrides: list[str], words: str, model: Path, tmp_path: Path
) -> None:
    job = Job(["train", config(tmp_path, model), *overrides], tmp_path / "log", world)
    codes, said, _ = ended(job)
    assert codes == [2] * world
    assert said.count(words) == 1 and said.count("\n") == 1, said
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("environment", [{"RANK": "3", "LOCAL_RANK": "7"}, {"RANK": "0", "WORLD_SIZE": "1"}])
def test_a_rank_by_hand_trains_alone(environment: dict[str, str], model: Path, tmp_path: Path) -> None:
    """A rank left over from elsewhere, and the only one of its job: neither meets anybody, whatever else is set."""
    others = {"MASTER_ADDR": "nowhere", "MASTER_PORT": "http", "TORCHELASTIC_USE_AGENT_STORE": "True"}
    arguments = ["train", config(tmp_path, model), "--parallel.tp=1", "--steps=1", "--checkpoint.at_end=false"]
    Job(arguments, tmp_path / "log", environments=[environment | others]).run()
    assert (tmp_path / "run" / "metrics.jsonl").exists()


def launched(work: Path, failures: str, world: int, monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setenv("FAILURES", failures)
    return launch([sys.executable, str(work / "rank.py")], world, timeout_s=200)


def test_the_launcher_says_last_which_rank_failed(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(work, "3:crash", 4, monkeypatch) == 1
    said = capfd.readouterr().err
    assert said.startswith("flowrl-mega: rank 3 failed:\nTraceback"), said
    assert said.endswith("ValueError: boom\nand more\nrank 3 failed: ValueError: boom; ended the others\n"), said
    assert said.count("Traceback") == 1 and said.count("\n") < 20
    assert (work / "run" / "faults" / "rank_3.log").exists()


def test_a_killed_rank_is_named_and_the_others_are_quiet(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Their collectives fail; what those say is in the run folder."""
    assert launched(work, "0:die", 2, monkeypatch) == 137
    assert capfd.readouterr().err == "rank 0 was killed by signal 9 (SIGKILL; out of memory?); ended the others\n"
    assert "Traceback" in (work / "run" / "faults" / "rank_1.log").read_text()


def test_the_launcher_adds_nothing_to_a_message(
    work: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    assert launched(work, "1:run", 2, monkeypatch) == 70
    assert capfd.readouterr().err == f"flowrl-mega: {MESSAGE}\n"


def test_torchrun(work: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks print one message and no traceback; the one that follows is torchrun's own, as is the exit code."""
    monkeypatch.setenv("FAILURES", "1:config")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "rank.py"]
    job = subprocess.run(torchrun, timeout=200, capture_output=True, text=True, cwd=work)
    ranks, _, torchruns = job.stderr.partition(f"flowrl-mega: {MESSAGE}\n")
    assert MESSAGE not in job.stdout + ranks + torchruns and torchruns, job.stderr
    assert "Traceback" not in ranks and torchruns.count("Traceback") <= 1 and "ChildFailedError" in torchruns, (
        job.stderr
    )
    assert set(re.findall(r"exitcode +: (-?\d+)", torchruns)) == {"2"}, job.stderr
