"""Programs that attack: each in tests/rewards/hostile says in its first line what it tries, and how it may end.

Where an attack could succeed in reading or reaching something, the program prints the right answer if it did: a reward
of 0 is then the proof that it did not. After each, nothing of it runs, nothing is written, nobody was reached.

None may do harm where it is not held, as on a sandbox that someone has just broken: as root these run with root's user
in the way "user". So they ask for what they must not get in a form that changes nothing, or stop and say that they won.
"""

from __future__ import annotations

import json
import os
import re
import secrets
from pathlib import Path

import psutil
import pytest
from sandbox_watch import adopting_orphans, as_nobody, changed, left_over, opened, programs, state, watching

from flowrl_mega.config import CodeSettings, RewardSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.sandbox.client import Sandbox

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent / "hostile"
NAMES = sorted(path.stem for path in FOLDER.glob("*.py"))
LIMITS = CodeSettings(
    wall_s=1.0, cpu_s=1, memory_mb=128, disk_mb=8, processes=12, open_files=32, output_kb=256, isolation="namespaces"
)
PATIENT = {"wall_s": 60.0, "cpu_s": 10}  # for programs that must not end by time, on a busy machine neither
SETTINGS = RewardSettings(function="-", code=LIMITS)
MOST_BYTES = 64 << 20  # of the fork server after all of them


@pytest.fixture(scope="module", autouse=True)
def orphans():
    with adopting_orphans():
        yield


# Where root runs the tests, its way is the one that a run would take.
USER = pytest.param("user", marks=pytest.mark.integration if os.geteuid() == 0 else [])


@pytest.fixture(scope="module", params=["root", USER])
def sandbox(request):
    """Namespaces made by root, and as any user makes them."""
    with opened(LIMITS, request.param) as sandbox:
        yield sandbox


@pytest.fixture(scope="module")
def watch(tmp_path_factory):
    with watching(tmp_path_factory.mktemp("trainer")) as watch:
        yield watch


def ends_of(source):
    """The kinds of verdict that a hostile program may get."""
    return re.search(r"# ends as: (.*)", source).group(1).split(", ")


def limited(settings, ends):
    """Settings for a program: a second where a time-out is one of its ends."""
    return settings if "time-out" in ends else settings.model_copy(update=PATIENT)


def row_for(name, facts):
    """A small real test: its sum is 5, or an answer that only the trainer knows."""
    if name.startswith("call_"):
        return {"type": "call", "name": "add", "inputs": [[a, 5 - a] for a in range(7)], "outputs": [5] * 7}
    if name.startswith("check_"):
        pairs = "zip([2, 3], map(lambda a: candidate(a, 1), [1, 2]))"  # an answer that ends the loop leaves no pair
        tests = f"def check(candidate):\n    assert all(right == got for right, got in {pairs})"
        return {"type": "check", "name": "add", "code": tests, "stub": "def add(a, b):\n    '''Their sum.'''\n"}
    expected = f"marker-{secrets.token_hex(16)}" if name == "look_for_expected" else "5"
    return {"type": "stdin", "inputs": [json.dumps(facts) + "\n"], "outputs": [expected]}


@pytest.mark.parametrize("name", NAMES)
def test_contained(name, sandbox, watch, monkeypatch):
    """Scored 0, ends as it says, and leaves all as it was."""
    source = (FOLDER / f"{name}.py").read_text()
    ends = ends_of(source)
    monkeypatch.setattr(sandbox, "settings", limited(LIMITS, ends))
    monkeypatch.setitem(os.environ, "FLOWRL_SECRET", "hostile-test-secret")
    monkeypatch.setattr(code, "_sandbox", lambda settings: sandbox)
    before, running = state(), programs()
    tests = row_for(name, watch.facts(sandbox._server.pid))
    reward, why, kind = code.score({"tests": tests}, f"```python\n{source}```", SETTINGS)
    assert reward == 0.0
    assert kind in ends, why
    assert left_over(running) == set()
    assert changed(before) == {}
    assert watch.heard() == []
    assert watch.written() == []
    assert sandbox.alive()


@pytest.mark.parametrize(
    "names",
    ["read_files read_environment read_memory write_outside change_interpreter link_outside mount become_root"]
    + ["tcp udp unix_abstract other_families namespace_by_clone chroot_escape raise_limits make_device"]
    + ["fork_bomb thread_bomb daemon daemon_exec new_group kill_parent kill_all memory_children flood_stdout"],
)
def test_contained_for_a_user_without_rights(names, watch, tmp_path, monkeypatch):
    """Of each kind of attack, where the sandbox is made by a user who is not root at all."""
    running = programs()
    sources = {name: (FOLDER / f"{name}.py").read_text() for name in names.split()}  # which nobody may not read

    def work(settings):
        limits = LIMITS.model_copy(update=settings)
        sandbox = Sandbox(limits, "user")
        code._sandbox = lambda settings: sandbox
        for name, source in sources.items():
            ends = ends_of(source)
            sandbox.settings = limited(limits, ends)
            tests = row_for(name, watch.facts(sandbox._server.pid))
            reward, why, kind = code.score({"tests": tests}, f"```python\n{source}```", SETTINGS)
            assert reward == 0.0 and kind in ends, (name, kind, why)
        sandbox.close()

    as_nobody(work, tmp_path, monkeypatch)
    assert left_over(running) == set()
    assert watch.heard() == []
    assert watch.written() == []


def test_right_after_all_of_them(sandbox, watch, monkeypatch):
    """The same sandbox still gives a right program its reward, and its server has not grown."""
    monkeypatch.setattr(code, "_sandbox", lambda settings: sandbox)
    right = "```python\ndef add(a, b):\n    return a + b\n\nif __name__ == '__main__':\n    print(add(2, 3))\n```"
    for name in ("stdin", "call_", "check_"):
        assert code.score({"tests": row_for(name, {})}, right, SETTINGS)[0] == 1.0
    assert psutil.Process(sandbox._server.pid).memory_info().rss < MOST_BYTES


def test_as_many_as_promised():
    """A folder that is not found would make the tests above pass by being none."""
    assert len(NAMES) >= 90
