"""SGLang servers under a real SLURM of two nodes: on every node of the trainer, and on nodes of their own.

What goes wrong goes wrong on the second node, which rank 0 sees through the network alone.
"""

from __future__ import annotations

import os
import re
import signal
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from jobs import records, write_config
from sglang_server import SMALL, server_python
from slurm_cluster import Cluster, missing
from slurm_jobs import ended, log, submit, until
from tiny_models import make

from flowrl_mega.rollout.sglang.endpoints import is_up

pytestmark = [
    pytest.mark.integration,
    pytest.mark.servers,
    pytest.mark.timeout(900),
    pytest.mark.skipif(missing() is not None, reason=f"no SLURM here: {missing()}"),
]
STEPS = 6
# Training waits while there is a file "wait": until a server is back, say.
REWARD = """
import os, time
from flowrl_mega.rewards import sums

def score(row, response):
    while os.path.exists("wait"):
        time.sleep(0.1)
    with open("scored", "a") as file:
        print(repr(response), file=file)  # a line, whatever the model writes
    return sums.score(row, response)
"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """stories260k, a real model, where it lies beside the data (make test-integration DATA=DIR); else a random one."""
    if data := request.config.getoption("--data"):
        real = Path(data).resolve().parent / "models" / "stories260k"
        if real.is_dir():
            return real
    return make("llama", tmp_path_factory.mktemp("model"), vocab=15)


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where sbatch is called, with an environment in it as `make setup` makes one."""
    (tmp_path / ".venv").symlink_to(sys.prefix)
    (tmp_path / "slow.py").write_text(REWARD)
    return tmp_path


def config(folder: Path, model: Path, dp: int, **rollout: Any) -> list[str]:
    """The arguments of a run with one server a node, whose weights are compared after every sync."""
    rollout = {
        "engine": "sglang", "python": server_python(), "server_args": {**SMALL, "max_total_tokens": 4096},
        "prompts_per_step": 8, "group_size": 4, "max_tokens": 8, "start_timeout_s": 240, "hang_s": 10,
        "concurrency": 3, "sync": {"checksum_every": 1}, **rollout,
    }  # fmt: skip
    parallel = {"tp": 1, "dp": dp, "timeout_s": 120}
    path = write_config(
        folder, model, steps=STEPS, parallel=parallel, rollout=rollout,
        reward={"function": f"{folder}/slow.py:score", "timeout_s": 600},
        checkpoint={"every": 0}, evaluation={"every": 0},
    )  # fmt: skip
    return [str(path)]


def url_of(server_log: Path) -> str:
    """A server's URL, by the last command line in its log."""
    port = re.findall(r"^=== .* --port (\d+)", server_log.read_text(), re.MULTILINE)[-1]
    return f"http://127.0.0.1:{port}"


def kill_server(url: str) -> None:
    port = int(url.rsplit(":", 1)[1])
    found = {c.pid for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port}
    assert found - {None}
    for pid in found - {None}:
        os.kill(pid, signal.SIGKILL)


def kill_and_await(server_log: Path, work: Path) -> None:
    """Kill a server, and hold the run up until it is there again. Where all answers of the step had come, nobody misses
    the server before the next sync: then the run gets three seconds to come to that."""
    starts, began = server_log.read_text().count("The server is fired up"), time.monotonic()
    (work / "wait").touch()
    kill_server(url_of(server_log))

    def is_back() -> bool:
        if 20 < time.monotonic() - began < 23:
            (work / "wait").unlink(missing_ok=True)
        else:
            (work / "wait").touch()
        return server_log.read_text().count("The server is fired up") > starts

    until(is_back, work)
    (work / "wait").unlink()


def has_step(work: Path, step: int) -> bool:
    metrics = work / "run" / "metrics.jsonl"
    return metrics.exists() and metrics.read_text().count("\n") >= step


def assert_sound(work: Path) -> list[dict[str, Any]]:
    """Every step is there, with answers of weights that the servers were seen to hold."""
    rows = records(work / "run", "metrics")
    assert [row["step"] for row in rows] == list(range(1, STEPS + 1))
    assert all(row["mismatch/abs_logp_diff"] < 1e-4 for row in rows if row["mismatch/max_staleness"] == 0)
    assert all(row["rollout/malformed"] == row["rollout/stale_answers"] == 0 for row in rows)
    assert "took the weights, but" not in log(work), "checksums"
    return rows


def test_every_node_has_servers_of_its_own(cluster: Cluster, model: Path, work: Path) -> None:
    """Both answer; that of the second node is killed, and started again by the rank there."""
    number = submit(cluster, work, *config(work, model, dp=2), ranks=1)
    until(lambda: has_step(work, 1), work)
    logs = [work / "run" / "servers" / name / "server_0.log" for name in ("", "node_1")]
    urls = [url_of(path) for path in logs]
    kill_and_await(logs[1], work)
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"]) == ("COMPLETED", "0:0"), job["log"]
    rows = assert_sound(work)
    assert (work / "scored").read_text().count("\n") == STEPS * 8 * 4, "each prompt is answered once"
    assert sum(row["rollout/restarts"] for row in rows) == 1, job["log"]
    assert re.search(rf"^1: server {urls[1]} ended \(signal SIGKILL\); starting it again", job["log"], re.MULTILINE)
    assert all("Prefill batch" in path.read_text() for path in logs)
    assert logs[1].read_text().count("The server is fired up") == 2
    assert not any(map(is_up, urls)), "they end with the job"


def test_nodes_for_generation_alone(cluster: Cluster, model: Path, work: Path) -> None:
    """The trainer finds them, one step ahead of it; a server that is killed comes back and is found again; stopped on
    request they last until the trainer has saved, and the requeued job finds its new ones."""
    number = submit(cluster, work, "--rollout-nodes=1", *config(work, model, dp=1), ranks=1)
    until(lambda: has_step(work, 1), work)
    server_log = work / "run" / "servers" / "node1" / "server_0.log"
    url = url_of(server_log)
    kill_and_await(server_log, work)
    done = len(records(work / "run", "metrics"))
    until(lambda: has_step(work, done + 2), work)
    cluster.call("scancel", "--signal=TERM", number)
    until(lambda: cluster.job(number)["Restarts"] == "1", work)
    until(lambda: not is_up(url), work)
    job = ended(cluster, number, work)
    assert (job["JobState"], job["ExitCode"], job["Restarts"]) == ("COMPLETED", "0:0", "1"), job["log"]
    rows = assert_sound(work)
    assert sum(row["rollout/servers_lost"] for row in rows) >= 1
    assert {row["mismatch/max_staleness"] for row in rows} == {0.0, 1.0}
    assert job["log"].count("stopped on request, with a checkpoint saved") == 1
    # SLURM's SIGTERM goes to the server itself, too, which is started again where the trainer still needs it.
    assert server_log.read_text().count("The server is fired up") in (3, 4)
    assert not list((work / "run" / "servers" / "nodes").iterdir())


@pytest.mark.parametrize("nodes", ["2", "x"])
def test_somebody_must_train(nodes: str, cluster: Cluster, work: Path) -> None:
    job = ended(cluster, submit(cluster, work, f"--rollout-nodes={nodes}", "any.yaml", ranks=1), work)
    assert (job["JobState"], job["ExitCode"]) == ("FAILED", "2:0")
    assert f"--rollout-nodes={nodes}: must be a number below the job's 2 nodes" in job["log"]
