"""The run folder's lock, between real processes; hosts, boots and containers are told by what the file says."""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from flowrl_mega import run_lock as module
from flowrl_mega.config import ConfigError
from flowrl_mega.run_lock import FILE, Owner, is_running, release_all, run_lock, started

HOLDER = """
import sys
from pathlib import Path
from flowrl_mega.run_lock import run_lock
with run_lock(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


@contextmanager
def holder(run_dir: Path) -> Iterator[subprocess.Popen[bytes]]:
    """Another process that holds the lock of `run_dir` until its standard input is closed."""
    command = [sys.executable, "-c", HOLDER, str(run_dir)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout and process.stdout.readline() == b"held\n"
        yield process


def write(run_dir: Path, owner: Owner) -> Path:
    run_dir.mkdir(exist_ok=True)
    (run_dir / FILE).write_text(json.dumps(asdict(owner)))
    return run_dir / FILE


def gone() -> int:
    """The pid of a process that was."""
    process = subprocess.Popen([sys.executable, "-S", "-c", ""])
    process.wait()
    return process.pid


def test_held_inside_the_block_and_nothing_is_left(tmp_path: Path) -> None:
    run_dir = tmp_path / "runs" / "mine"
    with run_lock(run_dir):
        assert os.listdir(run_dir) == [FILE]
        owner = json.loads((run_dir / FILE).read_text())
        assert owner["pid"] == os.getpid() and owner["host"] == os.uname().nodename and len(owner["since"]) == 19
    assert os.listdir(tmp_path) == []
    with run_lock(run_dir):
        (run_dir / "config.yaml").write_text("")
    assert os.listdir(run_dir) == ["config.yaml"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit, OSError])
def test_released_when_the_block_fails(error: type[BaseException], tmp_path: Path) -> None:
    with pytest.raises(error), run_lock(tmp_path / "run"):
        raise error
    assert os.listdir(tmp_path) == []


def test_a_second_launch_is_kept_out_until_the_first_has_ended(tmp_path: Path) -> None:
    with holder(tmp_path) as process:
        text = (tmp_path / FILE).read_text()
        with pytest.raises(ConfigError) as refused, run_lock(tmp_path):
            pytest.fail("two have it")
        since = json.loads(text)["since"]
        owner = f"host {os.uname().nodename}, pid {process.pid}, since {since}"
        assert str(refused.value) == (
            f"run_dir = {str(tmp_path)!r}: a run is under way there ({owner}); wait for it, "
            "end it, or choose another run_dir"
        )
        assert os.listdir(tmp_path) == [FILE] and (tmp_path / FILE).read_text() == text
        assert process.stdin
        process.stdin.close()
        assert process.wait(timeout=30) == 0
    with run_lock(tmp_path):
        pass


def test_a_killed_owners_is_taken_over_with_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with holder(tmp_path) as process:
        process.kill()
        process.wait()
    assert os.listdir(tmp_path) == [FILE]
    with run_lock(tmp_path):
        said = capsys.readouterr().err
        assert said.startswith(f"flowrl-mega: {tmp_path / FILE}: taken over, its owner is gone (host ")
        assert f"pid {process.pid}, since" in said and said.count("\n") == 1
        assert json.loads((tmp_path / FILE).read_text())["pid"] == os.getpid()
    assert os.listdir(tmp_path) == []


HERE = Owner.here()
# what the file says of its owner, and whether that owner is surely dead
OWNERS: dict[str, tuple[Callable[[], Owner], bool]] = {
    "lives": (lambda: HERE, False),
    "another user's": (lambda: replace(HERE, pid=1, started=started(1) or ""), False),
    "its pid is used again": (lambda: replace(HERE, started="1"), True),
    "is gone": (lambda: replace(HERE, pid=gone()), True),
    "before the host's restart": (lambda: replace(HERE, boot="another"), True),
    "another host": (lambda: replace(HERE, host="elsewhere", pid=gone(), boot="another"), False),
    "another host of this name": (lambda: replace(HERE, machine="another", pid=gone(), boot="another"), False),
    "another container of this host": (lambda: replace(HERE, namespace="pid:[1]", pid=gone()), False),
    "the job before SLURM requeued it": (lambda: replace(HERE, host="elsewhere", slurm_job="7"), True),
    "another step of this start": (lambda: replace(HERE, host="elsewhere", slurm_job="7", slurm_restarts=1), False),
    "another job": (lambda: replace(HERE, host="elsewhere", slurm_job="8"), False),
}


@pytest.mark.parametrize("case", OWNERS)
def test_only_what_is_surely_dead_is_taken_over(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    make, dead = OWNERS[case]
    path = write(tmp_path, make())
    before = path.read_text()
    if dead:
        with run_lock(tmp_path):
            assert "taken over" in capsys.readouterr().err
        return
    with pytest.raises(ConfigError) as refused, run_lock(tmp_path):
        pass
    cure = "wait for it, end it" if case in ("lives", "another user's") else f"remove {path} if that run is dead"
    assert cure in str(refused.value)
    assert path.read_text() == before and os.listdir(tmp_path) == [FILE]


def test_outside_of_slurm_no_two_launches_are_one_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert not replace(HERE, host="elsewhere", slurm_job="").is_dead(Owner.here())


def test_a_zombie_is_dead() -> None:
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    start = started(process.pid)
    assert start and is_running(process.pid, start)
    process.kill()
    os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOWAIT)
    assert not is_running(process.pid, start)
    process.communicate()


def test_a_process_that_may_not_be_looked_at_may_be_the_owner(monkeypatch: pytest.MonkeyPatch) -> None:
    """/proc mounted with hidepid shows nobody else's processes."""
    monkeypatch.setattr(module, "_text", lambda path: "")
    assert is_running(os.getpid(), "4711")
    assert not is_running(gone(), "4711")


@pytest.mark.parametrize("text", ["", "{", "[1]", "4711\n", '{"pid": 3}', None])
def test_a_file_that_names_nobody_is_refused(text: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "PATIENCE_S", 0.05)
    path = write(tmp_path, replace(HERE, pid=0))
    if text is not None:
        path.write_text(text)
    with pytest.raises(ConfigError) as refused, run_lock(tmp_path):
        pass
    assert f"{path} does not name its owner; remove it if no run is under way there" in str(refused.value)


def test_a_name_that_is_still_being_written_is_waited_for(tmp_path: Path) -> None:
    path = tmp_path / FILE
    path.touch()
    late = threading.Timer(0.1, write, (tmp_path, HERE))
    late.start()
    with pytest.raises(ConfigError, match="a run is under way there"), run_lock(tmp_path):
        pass
    late.join()


def test_a_file_system_without_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def link(*args: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", link)
    with run_lock(tmp_path):
        assert os.listdir(tmp_path) == [FILE]
        with pytest.raises(ConfigError, match="a run is under way there"), run_lock(tmp_path):
            pass
        assert os.listdir(tmp_path) == [FILE]
    assert os.listdir(tmp_path) == []


def test_over_nfs_an_answer_is_lost_and_the_request_repeated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.link

    def link(*args: Path) -> None:
        real(*args)
        real(*args)

    monkeypatch.setattr(os, "link", link)
    with run_lock(tmp_path):
        assert os.listdir(tmp_path) == [FILE]


def test_of_many_launches_one_takes_over(tmp_path: Path) -> None:
    """Eight processes find the same dead owner at once."""
    write(tmp_path, replace(HERE, pid=gone()))
    fork = multiprocessing.get_context("fork")
    together, results = fork.Barrier(8, timeout=30), fork.SimpleQueue()

    def launch() -> None:
        together.wait()
        try:
            with run_lock(tmp_path):
                results.put("held")
                together.wait()
        except ConfigError:
            results.put("refused")
            together.wait()

    several = [fork.Process(target=launch) for _ in range(8)]
    for process in several:
        process.start()
    for process in several:
        process.join(timeout=30)
    assert [process.exitcode for process in several] == [0] * 8
    assert sorted(results.get() for _ in several) == ["held", *["refused"] * 7]
    assert os.listdir(tmp_path) == []


def test_a_lock_that_was_replaced_between_two_looks_stays(tmp_path: Path) -> None:
    """Another launch has taken the dead owner's over: what was read of it no longer counts."""
    dead = json.dumps(asdict(replace(HERE, pid=gone())))
    path = write(tmp_path, HERE)
    before = path.read_text()
    assert not module._replaced(path, "mine", dead)
    assert path.read_text() == before
    path.unlink()
    assert not module._replaced(path, "mine", dead) and not path.exists()


def test_somebody_elses_lock_is_not_released(tmp_path: Path) -> None:
    """The file was removed by hand, and another run started."""
    with run_lock(tmp_path):
        path = write(tmp_path, replace(HERE, pid=1))
    assert path.exists()


def test_released_before_an_abrupt_end(tmp_path: Path) -> None:
    with run_lock(tmp_path / "run"):
        release_all()
        assert os.listdir(tmp_path / "run") == []


def test_a_forked_child_does_not_release_it(tmp_path: Path) -> None:
    """As one that a reward's process forked, which leaves by an exception through all that the parent was in."""
    try:
        with run_lock(tmp_path):
            child = os.fork()
            if child == 0:
                raise SystemExit
            os.waitpid(child, 0)
            assert (tmp_path / FILE).exists()
    except SystemExit:
        os._exit(0)


@pytest.mark.parametrize("place", ["/dev/null/run", "/proc/run", "file"])
def test_a_folder_that_cannot_be_written(place: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("file").touch()
    with pytest.raises(ConfigError) as refused, run_lock(Path(place)):
        pass
    assert f"run_dir = {place!r}: cannot be written (" in str(refused.value) and "choose another" in str(refused.value)
