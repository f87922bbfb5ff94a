"""A closed terminal asks a run to save and stop, and is nobody's reason to fail: real terminals, pipes and signals."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from flowrl_mega.cli import StopRequest
from flowrl_mega.hangup import stop_signals

# As a run: a line each step, and a file (the checkpoint) at the end of the step in which it was asked to stop.
RUN = """
import sys, time
from pathlib import Path
from flowrl_mega.cli import StopRequest
stop = StopRequest()
print("begun", flush=True)
for step in range(2000):
    time.sleep(0.01)
    print(f"step {step}", flush=True)
    print(f"step {step}", file=sys.stderr, flush=True)
    if stop():
        time.sleep(0.3)  # what reads a pipe may live a little longer than the terminal
        print("saving", flush=True)
        Path(sys.argv[1]).touch()
        sys.exit(75)
"""


@pytest.fixture
def hangups() -> Iterator[None]:
    """The tests may run under nohup."""
    before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
    yield
    signal.signal(signal.SIGHUP, before)


def code_of(pid: int) -> int:
    end = time.monotonic() + 30
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.02)
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return -1


def test_a_closed_terminal(tmp_path: Path, hangups: None) -> None:
    """Nothing can be written to it any more: each line would be an OSError."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execv(sys.executable, [sys.executable, "-c", RUN, str(tmp_path / "saved")])
    assert b"begun" in os.read(terminal, 100)
    os.close(terminal)
    assert code_of(pid) == 75
    assert (tmp_path / "saved").exists()


def test_a_pipe_whose_reader_dies_after_us(tmp_path: Path, hangups: None) -> None:
    """As in `flowrl-mega train ... 2>&1 | tee log`."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "saved")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as job:
        assert job.stdout and job.stdout.readline() == b"begun\n"
        job.send_signal(signal.SIGHUP)
        time.sleep(0.05)
        job.stdout.close()
        assert job.wait(timeout=30) == 75
    assert (tmp_path / "saved").exists()


def test_who_can_be_read_goes_on_speaking(tmp_path: Path, hangups: None) -> None:
    """A file, or a reader that stays: nothing is lost."""
    command = [sys.executable, "-c", RUN, str(tmp_path / "saved")]
    with open(tmp_path / "errors", "w") as errors:
        job = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=errors, text=True)
        assert job.stdout and job.stdout.readline() == "begun\n"
        job.send_signal(signal.SIGHUP)
        said = job.communicate(timeout=30)[0].splitlines()
    assert said[-1] == "saving" and job.returncode == 75
    assert (tmp_path / "errors").read_text().splitlines()[-1] == said[-2]


def test_under_nohup_a_hangup_is_ignored(tmp_path: Path, hangups: None) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)  # what nohup does, and processes inherit
    command = [sys.executable, "-c", RUN, str(tmp_path / "saved")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as job:
        assert job.stdout and job.stdout.readline() == "begun\n"
        job.send_signal(signal.SIGHUP)
        for _ in range(10):
            job.stdout.readline()
        assert job.poll() is None
        job.send_signal(signal.SIGTERM)
        job.communicate(timeout=30)
    assert job.returncode == 75


@pytest.mark.parametrize("handler", [signal.SIG_DFL, signal.SIG_IGN])
def test_handlers_are_restored(handler: signal.Handlers, hangups: None) -> None:
    signal.signal(signal.SIGHUP, handler)
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)]
    stop = StopRequest()
    assert (signal.SIGHUP in stop_signals()) == (handler == signal.SIG_DFL) and signal.SIGTERM in stop_signals()
    os.kill(os.getpid(), signal.SIGTERM)
    assert stop()
    stop.withdraw()
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGHUP)] == before
