"""Servers are started, watched and ended as processes. What runs here is a fake that misbehaves on demand; the real
server is tests/integration/test_sglang_servers.py."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import fake_server
import psutil
import pytest
from rank_pool import FORKSERVER

from flowrl_mega.config import ConfigError, RolloutSettings
from flowrl_mega.rollout.processes import is_free
from flowrl_mega.rollout.sglang import fleet as fleets
from flowrl_mega.rollout.sglang.fleet import Fleet, supervise

pytestmark = pytest.mark.slow

Make = Callable[..., Fleet]


@pytest.fixture
def make(tmp_path: Path) -> Iterator[Make]:
    """Makes fleets of fake servers with this behaviour; all are closed at the end."""
    made: list[Fleet] = []

    def fleet(mode: str = "serves", count: int = 1, **settings: Any) -> Fleet:
        python = fake_server.make(tmp_path)
        chosen = RolloutSettings(servers=count, python=python, server_args={"fake": mode}, **settings)
        made.append(Fleet(chosen, tmp_path, tmp_path / "servers", "fp32", trainer_gpus=0))
        return made[-1]

    yield fleet
    for each in made:
        each.close()


def info(fleet: Fleet, at: int = 0) -> dict[str, Any]:
    """What the fake server says of itself."""
    with urllib.request.urlopen(f"{fleet.urls[at]}/model_info", timeout=10) as answer:
        return json.load(answer)


def gone(*pids: int) -> bool:
    """Whether these processes end (a zombie has ended), given time to."""
    alive = []
    for pid in pids:
        try:
            alive.append(psutil.Process(pid))
        except psutil.NoSuchProcess:
            continue
    for _ in range(1000):
        alive = [process for process in alive if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
        if not alive:
            return True
        time.sleep(0.01)  # psutil's own wait would take the exit code away from Popen
    return False


def test_servers_start_together_and_end_with_their_children(make: Make):
    """All that they started is gone after close(), which may be called again; so is what a key protects ready."""
    fleet = make(count=2)
    fleet.start()
    first, second = info(fleet, 0), info(fleet, 1)
    assert first["pid"] != second["pid"] and all(map(fleet.is_alive, fleet.urls))
    fleet.close()
    fleet.close()
    assert gone(first["pid"], first["child"], second["pid"], second["child"])
    assert not any(map(fleet.is_alive, fleet.urls))
    locked = make("locked")
    locked.start()
    assert locked.is_alive(locked.urls[0])


def test_a_server_that_ignores_sigterm_is_killed(make: Make, monkeypatch: pytest.MonkeyPatch):
    """SGLang waits on SIGTERM for the answers under way, which may be for ever."""
    monkeypatch.setattr(fleets, "GRACE_S", 0.2)
    fleet = make("stubborn")
    fleet.start()
    said = info(fleet)
    fleet.close()
    assert gone(said["pid"], said["child"])


def test_a_server_does_not_take_itself_for_a_rank(make: Make, monkeypatch: pytest.MonkeyPatch):
    """torch in the server would read the trainer's rendezvous from its environment."""
    for name in fleets.OF_THE_JOB:
        monkeypatch.setenv(name, "1")
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    monkeypatch.setenv("KEPT", "1")
    fleet = make()
    fleet.start()
    environment = info(fleet)["environment"]
    assert environment["KEPT"] == "1"
    assert not {*fleets.OF_THE_JOB, "TORCHELASTIC_RUN_ID"} & set(environment)


def test_a_port_in_use_is_refused(make: Make, tmp_path: Path):
    """Who listens there answers as a server does, and would be taken for ours."""
    other = make()
    other.start()
    port = int(other.urls[0].rsplit(":", 1)[1])
    with pytest.raises(ConfigError, match=f"port {port} of 127.0.0.1.*in use"):
        Fleet(RolloutSettings(servers=2), tmp_path, tmp_path, "fp32", 0, ports=[port - 1, port])


def test_one_that_dies_early_ends_the_start(make: Make):
    """The message has the end of its log and where the log is; the other servers do not stay behind."""
    fleet = make("dies")
    with pytest.raises(ConfigError) as error:
        fleet.start()
    message = str(error.value)
    assert fleet.urls[0] in message and "exit code 3" in message and str(fleet.log(fleet.urls[0])) in message
    assert "error: the disk is on fire" in message and "rollout.server_args" in message


def test_the_others_end_when_one_dies_early(make: Make, monkeypatch: pytest.MonkeyPatch):
    """A job that fails at the start must not leave servers that hold memory."""
    pids: list[int] = []
    popen = fleets.popen

    def remember(*args: Any) -> Any:
        process = popen(*args)
        pids.append(process.pid)
        return process

    monkeypatch.setattr(fleets, "popen", remember)
    port = next(
        port for port in range(20000, 32000, 2) if is_free("127.0.0.1", port) and is_free("127.0.0.1", port + 1)
    )
    monkeypatch.setattr(fleets, "free_ports", lambda count: [port, port + 1])
    with pytest.raises(ConfigError, match="on fire"):
        make("dies at odd ports", count=2).start()
    assert len(pids) == 2 and gone(*pids)


def test_one_that_never_listens_ends_the_start(make: Make, capfd: pytest.CaptureFixture[str], monkeypatch: Any):
    """With the setting that would give it longer; meanwhile a line says that something is waited for."""
    monkeypatch.setattr(fleets, "PROGRESS_S", 0.5)
    fleet = make("deaf", start_timeout_s=1.5)
    with pytest.raises(ConfigError) as error:
        fleet.start()
    assert "rollout.start_timeout_s = 1.5" in str(error.value) and fleet.urls[0] in str(error.value)
    assert f"server {fleet.urls[0]} starting for" in capfd.readouterr().err


@pytest.mark.parametrize("fault", ["SIGKILL", "SIGSTOP"])
def test_a_dead_or_hanging_server_is_started_again(make: Make, fault: str, capfd: pytest.CaptureFixture[str]):
    """At the same address, by a thread that ends: the kernel counts that thread as the parent whose end kills."""
    fleet = make()
    fleet.start()
    url, before = fleet.urls[0], info(fleet)
    os.kill(before["pid"], getattr(signal, fault))
    if fault == "SIGKILL":
        assert gone(before["pid"])
        assert not fleet.is_alive(url)
    else:
        assert fleet.is_alive(url)
    thread = threading.Thread(target=fleet.restart, args=(url,))
    thread.start()
    thread.join(60)
    after = info(fleet)
    assert gone(before["pid"], before["child"]) and after["pid"] != before["pid"]
    assert not gone_now(after["pid"]) and fleet.is_alive(url)
    said = "ended (signal SIGKILL)" if fault == "SIGKILL" else "does not do its work"
    assert said in capfd.readouterr().err and said in fleet.log(url).read_text()
    assert fleet.log(url).read_text().count("waiting") == 2, "the log of the first start is kept"


def gone_now(pid: int) -> bool:
    return not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE


def test_a_closed_fleet_starts_nothing(make: Make):
    """A thread that restarts a server while the job ends must not leave one behind."""
    fleet = make()
    fleet.start()
    fleet.close()
    with pytest.raises(ConfigError, match="the job is ending"):
        fleet.restart(fleet.urls[0])
    assert not fleet.is_alive(fleet.urls[0])


def serve_and_sleep(python: str, folder: Path, pipe: Connection) -> None:
    """A trainer's process: its servers, and nothing that would end them."""
    fleet = Fleet(RolloutSettings(python=python), folder, folder, "fp32", 0)
    fleet.start()
    pipe.send(info(fleet))
    time.sleep(600)


def test_servers_die_with_a_killed_trainer(tmp_path: Path):
    """kill -9 leaves no time to clean up: the kernel does."""
    ours, theirs = FORKSERVER.Pipe()
    trainer = FORKSERVER.Process(target=serve_and_sleep, args=(fake_server.make(tmp_path), tmp_path, theirs))
    trainer.start()
    try:
        assert ours.poll(60)
        server = ours.recv()
    finally:
        trainer.kill()
    try:
        assert gone(server["pid"])
    finally:
        os.kill(server["child"], signal.SIGKILL)  # SGLang's own children ask the kernel for the same; the fake's do not


def test_supervision_restarts_until_it_is_stopped(make: Make):
    """`flowrl-mega serve` has nobody else who would notice."""
    fleet = make()
    fleet.start()
    before = info(fleet)["pid"]
    os.kill(before, signal.SIGKILL)
    assert gone(before)
    supervise(fleet, stop=lambda: fleet.is_alive(fleet.urls[0]))
    assert info(fleet)["pid"] != before


def test_servers_run_on_all_cores_of_the_job(tmp_path: Path):
    """srun gives the rank that starts them a share of the cores, which its servers' threads would fight for."""
    code = "import os; print(sorted(os.sched_getaffinity(0)))"
    mine = os.sched_getaffinity(0)
    try:
        os.sched_setaffinity(0, {min(mine)})
        with (tmp_path / "log").open("w") as log:
            process = fleets.popen([sys.executable, "-c", code], dict(os.environ), log)
        assert process.wait(60) == 0
    finally:
        os.sched_setaffinity(0, mine)
    assert (tmp_path / "log").read_text().strip() == str(sorted(mine))
    assert len(mine) > 1, "a machine of one core shows nothing"
