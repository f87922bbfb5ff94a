"""Programs that attack what runs them, where nothing but their limits holds them: each gets a verdict, and a right
program after it its reward. A failed call would say that the sandbox does not work.

They harm nothing but their own supervisor, and are run by a user without rights.
"""

from __future__ import annotations

import pytest
from sandbox_watch import adopting_orphans, as_nobody, left_over, programs

from flowrl_mega.config import CodeSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.sandbox.client import Sandbox

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
KILLED = ("crash", "its supervisor was killed")
SLEEP = "\ntime.sleep(30)"
ATTACKS = {
    "kill": (f"os.kill(supervisor, signal.SIGKILL){SLEEP}", *KILLED),
    "kill, with daemons": (f"{DAEMON}\nos.kill(supervisor, signal.SIGKILL){SLEEP}", *KILLED),
    "terminate": (f"os.kill(supervisor, signal.SIGTERM){SLEEP}", *KILLED),
    "stop": (f"os.kill(supervisor, signal.SIGSTOP){SLEEP}", *KILLED),
    "stop and kill init": (f"os.kill(supervisor, signal.SIGSTOP)\nos.kill(init, signal.SIGKILL){SLEEP}", *KILLED),
    "interrupt": (f"os.kill(supervisor, signal.SIGINT)\ntime.sleep(0.1)\n{RIGHT}", "right", ""),
    "kill init": (f"os.kill(init, signal.SIGKILL){SLEEP}", "crash", "killed by SIGKILL"),
}


@pytest.fixture(scope="module", autouse=True)
def orphans():
    with adopting_orphans():
        yield


@pytest.mark.parametrize("form", TESTS)
def test_a_program_without_a_user_of_its_own(form, tmp_path, monkeypatch):
    running = programs()

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
