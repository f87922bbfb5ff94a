"""Programs that attack what runs them, where nothing but their limits holds them: each gets a verdict, and a right
program after it its reward. A failed call would say that the sandbox does not work.

They harm nothing but their own supervisor, and are run by a user without rights.
"""

from __future__ import annotations

import os
import resource
import signal
import tempfile
import threading

import pytest
from sandbox_watch import adopting_orphans, as_nobody, left_over, programs

from flowrl_mega.config import CodeSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.sandbox.client import Sandbox, SandboxError

pytestmark = pytest.mark.slow

LIMITS = CodeSettings(wall_s=5.0, cpu_s=4, memory_mb=128, disk_mb=8, processes=12, open_files=32, isolation="process")
TESTS = {
    "stdin": {"type": "stdin", "inputs": ["5"], "outputs": ["5"]},
    "call": {"type": "call", "name": "f", "inputs": [[1], [2]], "outputs": [1, 2]},
    "check": {"type": "check", "name": "f", "code": "def check(f):\n    assert f(1) == 1", "stub": "def f(x):\n    ''"},
}
RIGHT = "def f(x):\n    return x\nprint(5)\n"
FIND = """
import os, signal, time

def parent(process):
    with open(f"/proc/{process}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[1])

init = os.getppid()
supervisor = parent(init)
"""
DAEMON = """
for _ in range(3):
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            while True:
                time.sleep(1)
        os._exit(0)
"""
FORGE = """
for process in (init, supervisor):
    try:
        for name in os.listdir(f"/proc/{process}/fd"):
            try:
                os.write(os.open(f"/proc/{process}/fd/{name}", os.O_WRONLY | os.O_NONBLOCK), b"refused by the program")
            except OSError:
                pass
    except OSError:
        pass
"""
LIMIT = """
import resource
for process in (init, supervisor, parent(supervisor)):
    try:
        resource.prlimit(process, resource.RLIMIT_NPROC, (0, 0))
    except OSError:
        pass
"""
KILLED = ("crash", "its supervisor was killed")
SLEEP = "; time.sleep(30)"
ATTACKS = {
    "kill": (f"os.kill(supervisor, signal.SIGKILL){SLEEP}", *KILLED),
    "kill, with daemons": (f"{DAEMON}\nos.kill(supervisor, signal.SIGKILL){SLEEP}", *KILLED),
    "terminate": (f"os.kill(supervisor, signal.SIGTERM){SLEEP}", *KILLED),
    "stop": (f"os.kill(supervisor, signal.SIGSTOP){SLEEP}", *KILLED),
    "stop and kill init": (f"os.kill(supervisor, signal.SIGSTOP)\nos.kill(init, signal.SIGKILL){SLEEP}", *KILLED),
    "interrupt": (f"os.kill(supervisor, signal.SIGINT)\ntime.sleep(0.1)\n{RIGHT}", "right", ""),
    "interrupt itself": (
        f"try:\n    os.kill(os.getpid(), signal.SIGINT){SLEEP}\nexcept KeyboardInterrupt:\n    pass\n{RIGHT}",
        "right",
        "",
    ),
    "its input by name": (f"open('/dev/stdin').read()\n{RIGHT}", "right", ""),
    "a forged refusal": (FORGE + RIGHT, "right", ""),
    "no processes for the server": (LIMIT + RIGHT, "right", ""),
    "kill init": (f"os.kill(init, signal.SIGKILL){SLEEP}", "crash", "killed by SIGKILL"),
}


@pytest.fixture(scope="module", autouse=True)
def orphans():
    with adopting_orphans():
        yield


@pytest.mark.parametrize("form", TESTS)
def test_a_program_without_a_user_of_its_own(form, tmp_path, monkeypatch):
    running, folders = programs(), set(os.listdir(tempfile.gettempdir()))

    def work(settings):
        sandbox = Sandbox(LIMITS.model_copy(update=settings), "process")
        code._sandbox = lambda settings: sandbox
        for name, (source, expected, words) in ATTACKS.items():
            _, why, kind = code.score({"tests": TESTS[form]}, f"```python\n{FIND}{source}\n```")
            assert (kind, words in why) == (expected, True), (name, kind, why)
            assert code.score({"tests": TESTS[form]}, f"```python\n{RIGHT}```")[0] == 1.0, name
        sandbox.close()

    as_nobody(work, tmp_path, monkeypatch)
    assert left_over(running) == set()
    left = set(os.listdir(tempfile.gettempdir())) - folders
    ours = [name for name in left if name.startswith("program-")]
    assert [name for name in ours if not os.path.exists(f"/proc/{name.split('-')[2]}")] == []


def test_a_machine_without_processes(tmp_path, monkeypatch):
    """For a moment, as when a program takes them all until it is ended: the next one waits. For long, it is an error of
    the sandbox, which does not end by it."""

    def work(settings):
        sandbox = Sandbox(LIMITS.model_copy(update=settings), "process")
        assert sandbox.run("print(5)", "").stdout == "5\n"
        server, most = sandbox._server.pid, resource.getrlimit(resource.RLIMIT_NPROC)
        resource.prlimit(server, resource.RLIMIT_NPROC, (0, most[1]))
        later = threading.Timer(0.2, resource.prlimit, (server, resource.RLIMIT_NPROC, most))
        later.start()
        assert sandbox.run("print(5)", "").stdout == "5\n"
        later.join()
        resource.prlimit(server, resource.RLIMIT_NPROC, (0, most[1]))
        with pytest.raises(SandboxError, match="fork: "):
            sandbox.run("print(5)", "")
        resource.prlimit(server, resource.RLIMIT_NPROC, most)
        assert sandbox.run("print(5)", "").stdout == "5\n"
        sandbox.close()

    as_nobody(work, tmp_path, monkeypatch)


def test_a_server_that_was_stopped(tmp_path, monkeypatch):
    """Is taken for dead, so that another takes its place; one that runs or sleeps is not."""

    def work(settings):
        sandbox = Sandbox(LIMITS.model_copy(update=settings), "process")
        assert sandbox.run("print(5)", "").stdout == "5\n" and sandbox.alive()
        os.kill(sandbox._server.pid, signal.SIGSTOP)
        os.waitid(os.P_PID, sandbox._server.pid, os.WSTOPPED | os.WNOWAIT)
        assert not sandbox.alive()
        sandbox.close()

    as_nobody(work, tmp_path, monkeypatch)
