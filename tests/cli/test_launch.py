"""Starting ranks: exit codes, time-outs, signals, and their environments."""

from __future__ import annotations

import os
import signal
import socket
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from jobs import FORKSERVER

from flowrl_mega.config import ParallelSettings
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.launch import launch, rank_environment, reserve_port

pytestmark = pytest.mark.slow

RANK = "import os, signal, sys, time; rank = int(os.environ['RANK']); "
WAIT = "time.sleep(60)"


def script(code: str) -> list[str]:
    return [sys.executable, "-S", "-c", RANK + code]


def test_ranks_know_their_places(tmp_path: Path) -> None:
    names = "'RANK', 'LOCAL_RANK', 'WORLD_SIZE', 'MASTER_ADDR'"
    assert (
        launch(script(f"open(f'{tmp_path}/{{rank}}', 'w').write(' '.join(os.environ[n] for n in [{names}]))"), 2) == 0
    )
    assert [(tmp_path / str(rank)).read_text() for rank in (0, 1)] == ["0 0 2 127.0.0.1", "1 1 2 127.0.0.1"]


@pytest.mark.parametrize(
    ("code", "wanted"),
    [("sys.exit(2)", 2), ("sys.exit(75)", 75), ("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137)],
)
def test_the_exit_code_passes_through(code: str, wanted: int) -> None:
    assert launch(script(code), 2, timeout_s=30) == wanted


@pytest.mark.parametrize(
    ("name", "words"),
    [("SIGKILL", "9 (SIGKILL; out of memory?)"), ("SIGSEGV", "11 (SIGSEGV)"), ("SIGRTMIN", "34 (SIGRTMIN)")],
)
def test_a_signal_that_ended_a_rank_is_named(name: str, words: str, capfd: pytest.CaptureFixture[str]) -> None:
    code = launch(script(f"rank == 2 and os.kill(os.getpid(), signal.{name}); {WAIT}"), 4, timeout_s=50)
    assert code == 128 + getattr(signal, name)
    assert capfd.readouterr().err == f"rank 2 was killed by signal {words}; ended the others\n"


def test_the_port_of_the_ranks_is_taken_before_they_start() -> None:
    """Nobody else can have it: the launcher listens there already, on a port that the kernel chose."""
    meet = "import socket; socket.create_connection((os.environ['MASTER_ADDR'], int(os.environ['MASTER_PORT'])))"
    assert launch(script(meet), 2, timeout_s=50) == 0


def test_a_reserved_port_is_for_one_server_alone() -> None:
    with reserve_port() as reserved:
        address = reserved.getsockname()
        with socket.socket() as other, pytest.raises(OSError, match="in use"):
            other.bind(address)
        with socket.create_server(address), socket.create_connection(address):
            pass
        with socket.create_server(address), socket.create_connection(address):
            pass  # and again, as after a restart


def test_a_rank_alone_needs_no_port() -> None:
    """Where the port of its environment is somebody else's, too."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        rank = FORKSERVER.Process(target=_alone, args=(rank_environment(0, 1, other.getsockname()[1]),))
        rank.start()
        rank.join(timeout=60)
        assert rank.exitcode == 0


def _alone(environment: dict[str, str]) -> None:
    os.environ.update(environment)
    assert layouts.init(ParallelSettings(timeout_s=10), seed=0).world == 1


def test_a_failing_rank_ends_all_and_its_error_is_seen(capfd: pytest.CaptureFixture[str]) -> None:
    """Also one that ignores every polite request."""
    code = f"signal.signal(signal.SIGTERM, signal.SIG_IGN)\nif rank: raise ValueError('this is why')\n{WAIT}"
    start = time.monotonic()
    assert launch(script(code), 2, timeout_s=50) == 1
    assert time.monotonic() - start < 25
    errors = capfd.readouterr().err
    assert "ValueError: this is why" in errors
    assert errors.endswith("rank 1 failed with exit code 1; ended the others\n")


def test_time_out(capfd: pytest.CaptureFixture[str]) -> None:
    assert launch(script(WAIT), 2, timeout_s=0.5) == 124
    assert "ran past its 0.5 s" in capfd.readouterr().err


def test_ranks_that_stop_on_request_get_time_for_it() -> None:
    """Rank 1 has saved and left; rank 0 is given its grace instead of being killed at once."""
    assert launch(script("rank or time.sleep(2.5)\nsys.exit(75)"), 2, timeout_s=50) == 75


@pytest.mark.parametrize(("number", "wanted"), [("SIGTERM", 75), ("SIGINT", 130), ("SIGHUP", 75)])
def test_signals_are_passed_on(number: str, wanted: int, tmp_path: Path) -> None:
    code = (
        f"signal.signal(signal.{number}, lambda *_: os._exit({wanted})); "
        f"open(f'{tmp_path}/{{rank}}', 'w').close(); {WAIT}"
    )
    job = _launched(script(code))
    _await(tmp_path / "0", tmp_path / "1")
    os.kill(job.pid, getattr(signal, number))
    job.join(timeout=30)
    assert job.exitcode == wanted


def test_under_nohup_a_hangup_stays_ignored(tmp_path: Path) -> None:
    """By the launcher, and by its ranks, which inherit that."""
    ignored = "signal.getsignal(signal.SIGHUP) == signal.SIG_IGN"
    code = f"open(f'{tmp_path}/{{rank}}', 'w').close(); time.sleep(1); sys.exit(75 if {ignored} else 3)"
    job = FORKSERVER.Process(target=_launch, args=(script(code), signal.SIG_IGN))
    job.start()
    _await(tmp_path / "0", tmp_path / "1")
    os.kill(job.pid, signal.SIGHUP)
    job.join(timeout=30)
    assert job.exitcode == 75


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's help is Linux's")
def test_no_orphans_when_the_launcher_is_killed(tmp_path: Path) -> None:
    code = f"f = open(f'{tmp_path}/.{{rank}}', 'w'); f.write(str(os.getpid())); f.close(); "
    job = _launched(script(code + f"os.rename(f.name, f'{tmp_path}/{{rank}}'); {WAIT}"))
    _await(tmp_path / "0", tmp_path / "1")
    ranks = [int((tmp_path / str(rank)).read_text()) for rank in (0, 1)]
    job.kill()
    end = time.monotonic() + 20
    while any(_alive(rank) for rank in ranks) and time.monotonic() < end:
        time.sleep(0.02)
    assert not any(_alive(rank) for rank in ranks)


def _launched(command: list[str]) -> Any:
    """A process that launches two ranks of `command`."""
    job = FORKSERVER.Process(target=_launch, args=(command,))
    job.start()
    return job


def _launch(command: list[str], on_hangup: signal.Handlers = signal.SIG_DFL) -> None:
    signal.signal(signal.SIGHUP, on_hangup)
    sys.exit(launch(command, 2, timeout_s=50))


def _await(*paths: Path) -> None:
    end = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < end, "the ranks did not start"
        time.sleep(0.02)


def _alive(pid: int) -> bool:
    """False also for a zombie, which nobody may have collected yet."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def test_cores_are_shared_out_but_the_users_own_word_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    cores = len(os.sched_getaffinity(0))
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    assert rank_environment(0, 1, 1)["OMP_NUM_THREADS"] == str(cores)
    assert rank_environment(0, 4 * cores, 1)["OMP_NUM_THREADS"] == "1"
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    assert rank_environment(0, 2, 1)["OMP_NUM_THREADS"] == "7"
