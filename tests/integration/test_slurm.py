"""The project's own sbatch under a real SLURM of two nodes: the same numbers as on one, and gone on with when stopped.

Settings of the site are given as the script says, to sbatch; .venv is a link to the environment of these tests.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, records, write_config
from slurm_cluster import NODES, Cluster, missing
from tiny_models import make

from flowrl_mega.checkpoint.folder import checkpoints

ROOT = Path(__file__).parents[2]
SITE = ["--nodes=2", "--ntasks-per-node=2", "--cpus-per-task=1", "--gpus-per-node=0", "--output=log"]
STEPS = 4
# Slow enough to be stopped in time; and it tells which rank is where.
REWARD = """
import os, time
from flowrl_mega.rewards import sums

def score(row, response):
    time.sleep(0.2)
    with open("places", "a") as file:
        print(os.environ.get("SLURMD_NODENAME"), os.environ["RANK"], os.environ["LOCAL_RANK"], file=file)
    return sums.score(row, response)
"""

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"), vocab=15)


@pytest.fixture(scope="module")
def one_node(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The run folder of four ranks that nothing disturbed and that no SLURM started."""
    folder = tmp_path_factory.mktemp("one")
    Job(["train", str(config(folder, model))], folder / "log", world=4).run()
    return folder / "run"


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where sbatch is called, with an environment in it as `make setup` makes one."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "slow.py").write_text(REWARD)
    return tmp_path


def config(folder: Path, model: Path) -> Path:
    parallel = {"tp": 2, "dp": 2, "timeout_s": 60}
    return write_config(folder, model, steps=STEPS, parallel=parallel, checkpoint={"every": 0})


def submit(cluster: Cluster, work: Path, *arguments: str, site: tuple[str, ...] = ()) -> str:
    """The number of the job that runs `flowrl-mega train ARGUMENTS` on two nodes of two ranks."""
    script = str(ROOT / "examples" / "slurm" / "train.sbatch")
    # On one host ranks meet on the loopback device. The path is for a clone that is not installed in the environment.
    one_host = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    return cluster.call("sbatch", "--parsable", *SITE, *site, script, *arguments, cwd=work, **one_host)


def until(condition: Callable[[], Any], work: Path, timeout: float = 60) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"nothing happened\n{log(work)}"
        time.sleep(0.05)


def log(work: Path) -> str:
    return (work / "log").read_text() if (work / "log").exists() else "(no log)"


def ended(cluster: Cluster, number: str, work: Path) -> dict[str, str]:
    return pick(cluster.wait(number, 120), "JobState", "ExitCode", "Restarts", "NodeList") | {"log": log(work)}


def pick(job: dict[str, str], *names: str) -> dict[str, str]:
    return {name: job[name] for name in names}


def test_two_nodes_train_as_one(cluster: Cluster, model: Path, one_node: Path, work: Path) -> None:
    """TP inside a node, DP across: each tensor-parallel pair has a node of its own, and all records are those of four
    ranks on one node, to the bit."""
    number = submit(cluster, work, str(config(work, model)), "--steps=2", f"--reward={work}/slow.py:score")
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "0"), job["log"]
    places = {tuple(line.split()) for line in (work / "places").read_text().splitlines()}
    assert places == {(node, str(2 * n + local), str(local)) for n, node in enumerate(NODES) for local in (0, 1)}
    rows = records(work / "run", "metrics")
    assert len(rows) == 2 and rows == records(one_node, "metrics")[:2]
    assert records(work / "run", "samples") == records(one_node, "samples")[: len(records(work / "run", "samples"))]


def test_stopped_on_request_the_job_goes_on(cluster: Cluster, model: Path, one_node: Path, work: Path) -> None:
    """SIGTERM to the steps, as SLURM warns of the time limit: a checkpoint, exit code 75, back into the queue, and
    the same run to its end; its records are those of one that nobody stopped, to the bit."""
    number = submit(cluster, work, str(config(work, model)), f"--reward={work}/slow.py:score")
    until(lambda: (work / "run" / "metrics.jsonl").exists(), work)
    cluster.call("scancel", "--signal=TERM", number)
    until(lambda: cluster.job(number)["Restarts"] == "1", work)
    done = len(records(work / "run", "metrics"))
    assert 1 <= done < STEPS, "stopped too late to show anything"
    assert [path.name for path in checkpoints(work / "run")] == [f"step_{done}"]
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job["log"]
    assert job["log"].count("stopped on request, with a checkpoint saved") == 1
    for name in ("metrics", "samples", "evaluation"):
        assert records(work / "run", name) == records(one_node, name), name


def test_wrong_input_is_told_once_and_not_tried_again(cluster: Cluster, model: Path, work: Path) -> None:
    job = ended(cluster, submit(cluster, work, str(config(work, model)), "--rollout.groupsize=4"), work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("FAILED", "2:0", "0"), job["log"]
    assert job["log"].count("rollout.groupsize: no such setting; did you mean 'group_size'?") == 1, job["log"]
    assert "not requeued" in job["log"] and "Traceback" not in job["log"]


def test_cancelled_it_does_not_come_back(cluster: Cluster, model: Path, work: Path) -> None:
    """scancel, too, sends SIGTERM, at which the ranks save and end with 75."""
    number = submit(cluster, work, str(config(work, model)), f"--reward={work}/slow.py:score")
    until(lambda: (work / "run" / "metrics.jsonl").exists(), work)
    cluster.call("scancel", number)
    job = ended(cluster, number, work)
    assert (job["JobState"], job["Restarts"]) == ("CANCELLED", "0"), job["log"]


def test_pre_empted_it_goes_on(cluster: Cluster, model: Path, one_node: Path, work: Path) -> None:
    """A job of higher priority takes the nodes: within the partition's grace time the run saves, and it comes back."""
    number = submit(cluster, work, str(config(work, model)), f"--reward={work}/slow.py:score", site=("--exclusive",))
    until(lambda: (work / "run" / "metrics.jsonl").exists(), work)
    other = cluster.call("sbatch", "--parsable", "--partition=high", "--nodes=2", "--exclusive", "--wrap=true")
    until(lambda: checkpoints(work / "run"), work)
    assert cluster.wait(other, 60)["JobState"] == "COMPLETED"
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job["log"]
    assert records(work / "run", "metrics") == records(one_node, "metrics")
