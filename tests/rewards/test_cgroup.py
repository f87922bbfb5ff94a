"""Memory of all processes of a program: held by a cgroup where this machine allows it, summed where it does not."""

from __future__ import annotations

import importlib
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
from sandbox_watch import opened

from flowrl_mega.config import CodeSettings
from flowrl_mega.rewards.sandbox import choose as choosing
from flowrl_mega.rewards.sandbox import client
from flowrl_mega.rewards.sandbox.client import Sandbox, SandboxError, advance

LIMITS = CodeSettings(wall_s=60.0, cpu_s=20, memory_mb=128, disk_mb=64, processes=12, isolation="process")
MB = 1 << 20


@pytest.fixture
def cgroup(monkeypatch):
    """The module, as the fork server imports it."""
    monkeypatch.syspath_prepend(Path(client.__file__).parent)
    return importlib.import_module("cgroup")


@pytest.fixture
def place(cgroup):
    """Where groups can really be made here."""
    return cgroup.find() or pytest.skip("no cgroup of memory that this user may make")


# The files


@pytest.fixture
def fake(cgroup, tmp_path, monkeypatch):
    """A folder that acts like one of cgroups v2: new folders have files, and vanish with them."""
    names = ["cgroup.procs", "memory.max", "memory.swap.max", "memory.oom.group", "memory.events", "pids.max"]

    def mkdir(path):
        Path(path).mkdir()
        for name in names:
            (Path(path) / name).touch()

    monkeypatch.setattr(cgroup, "os", SimpleNamespace(**vars(os) | {"mkdir": mkdir, "rmdir": shutil.rmtree}))
    return cgroup.Place(cgroup.V2, str(tmp_path), "flowrl-1-2-"), names


def entered(group):
    """The groups of a child that was forked in this one."""
    door, (reading, writing) = group.door(), os.pipe()
    child = group.fork(door)
    if child == 0:
        os.write(writing, Path("/proc/self/cgroup").read_bytes())
        os._exit(0)
    os.waitpid(child, 0)
    for fd in (door, writing):
        os.close(fd)
    with open(reading) as file:
        return file.read()


def test_limits_of_v2(fake):
    """Memory, no swap beside it, all processes end together, and their number."""
    group = fake[0].make(7, 128 * MB, 14)
    assert Path(group.path).name == "flowrl-1-2-7"
    written = {path.name: path.read_text() for path in Path(group.path).iterdir()}
    assert written == {
        "cgroup.procs": "",
        "memory.max": str(128 * MB),
        "memory.swap.max": "0",
        "memory.oom.group": "1",
        "memory.events": "",
        "pids.max": "14",
    }
    assert entered(group)
    assert Path(group.path, "cgroup.procs").read_text() == "0"
    group.remove()
    assert not Path(group.path).exists()


@pytest.mark.parametrize("missing", ["memory.swap.max", "memory.oom.group", "pids.max"])
def test_a_limit_that_is_not_there(fake, missing):
    """Is left out: a controller that is not given, or an older kernel. The limit of memory still is."""
    place, names = fake
    names.remove(missing)
    group = place.make(7, MB, 14)
    assert Path(group.path, "memory.max").read_text() == str(MB)
    assert not Path(group.path, missing).exists()


def test_no_controller_of_memory(fake):
    """As where subtree_control lacks it: nothing is made, and nothing left."""
    place, names = fake
    names.remove("memory.max")
    with pytest.raises(OSError):
        place.make(7, MB, 14)
    assert not place.works()
    assert os.listdir(place.folder) == []


def test_a_group_that_holds_nobody_does_not_work(fake):
    """What counts is that a process is ended, not that files could be written."""
    assert not fake[0].works()
    assert os.listdir(fake[0].folder) == []


def test_a_child_is_born_in_a_group_of_v2(cgroup):
    """Really, where this user may make one, with memory in it or without: by clone3, as nothing is written."""
    kind = cgroup.V2._replace(values={"cgroup.max.depth": "1"}, enter="cgroup.max.depth")  # nobody enters by that
    for _, mount, own in [found for found in cgroup.hierarchies("/proc/self") if found[0] is cgroup.V2]:
        place = cgroup.Place(kind, own, f"flowrl-test-{os.getpid()}-")
        try:
            group = place.make(1, MB, 1)
        except OSError as error:
            pytest.skip(str(error))
        try:
            assert f"0::{group.path.removeprefix(mount)}\n" in entered(group)
        finally:
            group.remove()
        assert not Path(group.path).exists()


def test_a_kernel_that_does_not_count_kills(place):
    """Which ends a process all the same: the verdict would not say why."""
    assert place.works()
    assert not place._replace(kind=place.kind._replace(kills="memory.stat")).works()


def test_a_new_group_of_a_living_server(place):
    """In which no process is yet, is not cleaned away by another server. Nor is what has another name."""
    group, other = place.make(1, MB, 14), Path(place.folder, "flowrl-0-3")
    other.mkdir()
    place._replace(prefix=place.prefix.replace(f"-{os.getpid()}-", "-1-")).clean()
    there = Path(group.path).exists(), other.exists()
    group.remove()
    other.rmdir()
    assert there == (True, True)


@pytest.mark.parametrize(
    "kind, text, kills",
    [
        ("V2", "low 0\nhigh 0\nmax 7\noom 3\noom_kill 2\noom_group_kill 1\n", 2),
        ("V2", "max 7\noom 3\noom_kill 0\n", 0),  # reclaimed in time
        ("V1", "oom_kill_disable 0\nunder_oom 0\noom_kill 1\n", 1),
        ("V1", "oom_kill_disable 0\nunder_oom 1\n", 0),  # a kernel that does not count
    ],
)
def test_kills(cgroup, tmp_path, kind, text, kills):
    kind = getattr(cgroup, kind)
    (tmp_path / kind.kills).write_text(text)
    assert cgroup.Group(kind, str(tmp_path)).kills() == kills


V2_LINE = "34 24 0:29 {root} /sys/fs/cgroup rw,nosuid shared:9 - cgroup2 cgroup2 rw,nsdelegate\n"
V1_LINE = "35 31 0:32 {root} /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n"
CPU_LINE = "36 31 0:33 / /sys/fs/cgroup/cpu rw,relatime - cgroup cgroup rw,cpu\n"


@pytest.mark.parametrize(
    "groups, mounts, expected",
    [
        ("0::/user.slice/a\n", V2_LINE.format(root="/"), [("v2", "/sys/fs/cgroup", "/user.slice/a")]),
        ("0::/\n", V2_LINE.format(root="/"), [("v2", "/sys/fs/cgroup", "")]),
        ("3:cpu:/x\n4:memory:/x\n", CPU_LINE + V1_LINE.format(root="/"), [("v1", "/sys/fs/cgroup/memory", "/x")]),
        ("4:cpu,memory:/x\n", V1_LINE.format(root="/"), [("v1", "/sys/fs/cgroup/memory", "/x")]),
        # containers, whose mount shows their own part, or another's
        ("4:memory:/docker/12\n", V1_LINE.format(root="/docker/12"), [("v1", "/sys/fs/cgroup/memory", "")]),
        ("4:memory:/docker/12/a\n", V1_LINE.format(root="/docker/12"), [("v1", "/sys/fs/cgroup/memory", "/a")]),
        ("4:memory:/docker/123\n", V1_LINE.format(root="/docker/12"), [("v1", "/sys/fs/cgroup/memory", "")]),
        ("0::/../..\n", V2_LINE.format(root="/"), [("v2", "/sys/fs/cgroup", "")]),
        ("3:cpu:/x\n", CPU_LINE, []),
        ("3:cpu:/x\n", CPU_LINE + V1_LINE.format(root="/"), []),
    ],
)
def test_where_groups_are(cgroup, tmp_path, groups, mounts, expected):
    (tmp_path / "cgroup").write_text(groups)
    (tmp_path / "mountinfo").write_text(mounts)
    found = [(kind.name, mount, own.removeprefix(mount)) for kind, mount, own in cgroup.hierarchies(str(tmp_path))]
    assert found == expected


def test_a_machine_without_cgroups(cgroup, tmp_path):
    (tmp_path / "cgroup").write_text("")
    (tmp_path / "mountinfo").write_text("")
    assert cgroup.find(str(tmp_path)) is None


# Programs


@pytest.fixture(params=["as here", "summed"])
def way_of_counting(request, tmp_path, monkeypatch):
    """As this machine allows it, and as one that allows no cgroup."""
    if request.param == "summed":
        package = tmp_path / "sandbox"
        shutil.copytree(Path(client.__file__).parent, package)
        with (package / "cgroup.py").open("a") as file:
            file.write("\n\ndef find():\n    return None\n")
        monkeypatch.setattr(client, "SERVER", package / "server.py")
    return request.param


@pytest.fixture(params=["root", "user", "process"])
def sandbox(request, way_of_counting):
    with opened(LIMITS, request.param) as sandbox:
        yield sandbox


CHILDREN = """
import mmap, os, time
for _ in range({children}):
    if os.fork() == 0:
        block = {block}
        for at in range(0, len(block), 4096):
            block[at] = 1
        time.sleep({seconds})
        os._exit(0)
for _ in range({children}):
    os.wait()
print("ended")
"""


@pytest.mark.slow
@pytest.mark.parametrize("block", ["bytearray(40 << 20)", "mmap.mmap(-1, 40 << 20)"], ids=["private", "shared"])
@pytest.mark.parametrize("children, seconds, end", [(6, 30, "memory"), (2, 0, "exit")])
def test_the_sum_over_processes_is_bounded(sandbox, block, children, seconds, end):
    """240 of 128 MB, each process far below the limit; 80 are allowed."""
    outcome = sandbox.run(CHILDREN.format(children=children, block=block, seconds=seconds), "")
    assert outcome.end == end, outcome
    assert outcome.stdout == ("" if end == "memory" else "ended\n")


@pytest.fixture
def held(place):
    """A sandbox whose programs are in cgroups."""
    with opened(LIMITS, "root" if os.geteuid() == 0 else "user") as sandbox:
        assert sandbox.memory() == place.kind.name
        yield sandbox


def groups_of(place, sandbox):
    """Those of its programs that there are."""
    return [name for name in os.listdir(place.folder) if name.split("-")[2:3] == [str(sandbox._server.pid)]]


def running(sandbox, source="import time\ntime.sleep(60)", **limits):
    """A program that has begun."""
    program = sandbox.start(mode="stdin", parts=["print('begun', flush=True)\n" + source], prelude=False)
    advance([program], lambda: bool(program._output["stdout"]))
    return program


@pytest.mark.slow
def test_the_kernels_kill_is_the_verdict(held):
    """Whatever the program makes of it: here a child is ended, and the program says that all is well."""
    source = CHILDREN.format(children=1, block="mmap.mmap(-1, 300 << 20)", seconds=0)
    assert held.run(source, "").end == "memory"


@pytest.mark.slow
@pytest.mark.parametrize("megabytes, end", [(200, "memory"), (40, "exit")])
def test_files_in_memory_count(held, megabytes, end, monkeypatch):
    monkeypatch.setattr(held, "settings", LIMITS.model_copy(update={"disk_mb": 256}))
    source = f"with open('big', 'wb') as file:\n    for _ in range({megabytes}):\n        file.write(bytes(1 << 20))"
    outcome = held.run(source, "")
    assert (outcome.end, outcome.code) == (end, 0), outcome


@pytest.mark.slow
def test_the_input_does_not_count(held, monkeypatch):
    """A program has a copy of it that it cannot refuse."""
    monkeypatch.setattr(held, "settings", LIMITS.model_copy(update={"memory_mb": 32}))
    assert held.run("print(5)", "5" * (40 << 20)).stdout == "5\n"


@pytest.mark.slow
def test_each_program_has_a_group(place, held):
    """Gone when the program is."""
    with running(held), running(held):
        assert len(groups_of(place, held)) == 2
    assert groups_of(place, held) == []


@pytest.mark.slow
def test_the_server_ends_after_its_programs(place, held):
    """Where the worker has gone in between, and had not heard what the server says first: no group stays."""
    server = Sandbox(LIMITS, held.way)
    with running(server):
        server._requests.close()
        assert len(groups_of(place, server)) == 1
    assert server._server.wait() == 0
    assert groups_of(place, server) == []


@pytest.mark.slow
def test_the_first_word_counts(held):
    """Where a supervisor was killed after it had said how its program ended, the server says something too."""
    with running(held) as program:
        program._ends(b'{"end": "exit", "code": 3}\n{"end": "refused"}\n')
        assert (program.outcome().end, program.outcome().code) == ("exit", 3)


@pytest.mark.slow
def test_the_group_of_a_dead_supervisor(place, held):
    """Is removed by the server, which ends what is left; the error is the sandbox's, as no program can do that."""
    with running(held) as program:
        (supervisor,) = psutil.Process(held._server.pid).children()
        supervisor.kill()
        advance([program], lambda: False)
        with pytest.raises(SandboxError, match="its supervisor was killed"):
            program.outcome()
        assert psutil.Process(held._server.pid).children() == []
    assert groups_of(place, held) == []
    assert held.run("print(5)", "").stdout == "5\n"


@pytest.mark.slow
def test_the_group_of_a_dead_server(cgroup, place, held):
    """Is removed by the next one; that of one that lives is not."""
    other = Sandbox(LIMITS, held.way)
    with running(held), running(other):
        os.kill(held._server.pid, signal.SIGKILL)
        held._server.wait()
    assert len(groups_of(place, held)) == 1
    with running(other):
        assert cgroup.find()
        assert groups_of(place, held) == [] and len(groups_of(place, other)) == 1
    other.close()


@pytest.mark.slow
def test_says_how_memory_is_held(way_of_counting, cgroup):
    """In the sandbox's description."""
    sandbox, words = choosing.choose(LIMITS)
    sandbox.close()
    place = cgroup.find() if way_of_counting == "as here" else None
    assert (f"memory held by a cgroup ({place.kind.name})" if place else "memory summed 20 times a second") in words
