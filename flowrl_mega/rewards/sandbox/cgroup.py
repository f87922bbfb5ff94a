"""A memory cgroup for each program, where this machine allows it: the kernel counts all that is the program's, shared
memory and files in memory too, and ends it before it has more. stdlib only.

The two versions of cgroups differ by the names in V1 and V2. Which works, and where, is tried once for a fork server.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import signal
import struct
import time
from collections.abc import Iterator
from typing import NamedTuple

import jail  # type: ignore[import-not-found]

MARK = "flowrl"
TRIAL = 2 << 20  # bytes of the group in which a trial is made, which it passes four times
CLONE3, INTO_CGROUP = 435, 1 << 33


class Kind(NamedTuple):
    """Names of one version's files."""

    name: str
    enter: str  # takes "0": the process that writes it
    kills: str  # has a line "oom_kill N"
    values: dict[str, str]  # the first must be taken, the others where they are there


# "tasks" moves one thread, all that enters. For "cgroup.procs" the kernel waits until nothing forks: 10 ms and more.
V1 = Kind(
    "v1",
    "tasks",
    "memory.oom_control",
    {"memory.limit_in_bytes": "{memory}", "memory.memsw.limit_in_bytes": "{memory}", "memory.oom_control": "0"},
)
V2 = Kind(
    "v2",
    "cgroup.procs",
    "memory.events",
    {"memory.max": "{memory}", "memory.swap.max": "0", "memory.oom.group": "1", "pids.max": "{processes}"},
)


class Group(NamedTuple):
    """One program's."""

    kind: Kind
    path: str

    def door(self) -> int:
        """A file descriptor: who writes "0" to it is in. Who opens it must have the right to, not who writes."""
        return os.open(f"{self.path}/{self.kind.enter}", os.O_WRONLY | os.O_CLOEXEC)

    def fork(self, door: int) -> int:
        """os.fork, the child in this group: of v2 it is born there, else it enters."""
        if self.kind.name == "v2":
            process = self._clone()
            if process >= 0:
                return process
        process = jail.fork()
        if process == 0:
            os.write(door, b"0")
        return process

    def _clone(self) -> int:
        """A plain system call: of what os.fork does beside it, nothing matters to a process with a single thread."""
        folder = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY)
        flags = struct.pack("11Q", INTO_CGROUP, 0, 0, 0, signal.SIGCHLD, 0, 0, 0, 0, 0, folder)
        process = jail.libc.syscall(CLONE3, flags, len(flags))
        os.close(folder)
        return process

    def kills(self) -> int:
        """How many of its processes the kernel has ended because it had no memory left."""
        with open(f"{self.path}/{self.kind.kills}") as file:
            counts = dict(line.split() for line in file if line.strip())
        return int(counts.get("oom_kill", 0))

    def remove(self) -> None:
        """When nothing is in it any more; the last to leave may need a moment."""
        for _ in range(100):
            try:
                os.rmdir(self.path)
            except FileNotFoundError:
                return
            except OSError:
                time.sleep(0.001)


class Place(NamedTuple):
    """A folder in which this process may make groups. Each is named after the two processes that answer for it."""

    kind: Kind
    folder: str
    prefix: str  # of this fork server's groups

    def group(self, supervisor: int) -> Group:
        return Group(self.kind, f"{self.folder}/{self.prefix}{supervisor}")

    def make(self, supervisor: int, memory: int, processes: int) -> Group:
        """A new group, of so many bytes and, where it can count them, processes. OSError: it cannot be made."""
        group = self.group(supervisor)
        os.mkdir(group.path)
        try:
            for number, (name, value) in enumerate(self.kind.values.items()):
                with contextlib.suppress(*[OSError] if number else []), open(f"{group.path}/{name}", "r+b", 0) as file:
                    file.write(value.format(memory=memory, processes=processes).encode())
        except OSError:
            group.remove()
            raise
        return group

    def works(self) -> bool:
        """Whether the kernel ends a process in such a group that shares more memory than is given, and says so."""
        try:
            group = self.make(os.getpid(), TRIAL, 8)
        except OSError:
            return False
        try:
            door = group.door()
            child = group.fork(door)
            if child == 0:
                _pass_the_limit()
            os.close(door)
            _, status = os.waitpid(child, 0)
            return os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL and group.kills() > 0
        except OSError:
            return False
        finally:
            group.remove()

    def clean(self) -> None:
        """Removes what dead servers have left. Of those in other pid namespaces nobody knows here whether they live."""
        namespace = self.prefix[:-1].rpartition("-")[0]
        with contextlib.suppress(OSError):
            for name in os.listdir(self.folder):
                start, _, server = name.rpartition("-")[0].rpartition("-")
                if start == namespace and not os.path.exists(f"/proc/{server}"):
                    with contextlib.suppress(OSError):
                        os.rmdir(f"{self.folder}/{name}")


def _pass_the_limit() -> None:
    try:
        signal.alarm(5)  # a group whose processes wait for memory instead
        mmap.mmap(-1, 4 * TRIAL).write(bytes(4 * TRIAL))
    finally:
        os._exit(0)


def find(process: str = "/proc/self") -> Place | None:
    """Where groups can be made: the own group, or the nearest above it. None: nowhere."""
    prefix = f"{MARK}-{os.stat('/proc/self/ns/pid').st_ino}-{os.getpid()}-"
    for kind, mount, own in hierarchies(process):
        folder = own
        while True:
            place = Place(kind, folder, prefix)
            place.clean()
            if place.works():
                return place
            if folder == mount:
                break
            folder = os.path.dirname(folder)
    return None


def hierarchies(process: str) -> Iterator[tuple[Kind, str, str]]:
    """Each mounted hierarchy that may count memory, as this process sees it: its kind, its top, the own folder."""
    own: dict[str, str] = {}  # by controller; v2 has the empty name
    with open(f"{process}/cgroup") as file:
        for line in file:
            _, names, path = line.rstrip("\n").split(":", 2)
            own |= dict.fromkeys(names.split(","), path)
    with open(f"{process}/mountinfo") as file:
        mounts = [(line.split(), line.rpartition(" - ")[2].split()) for line in file]
    for (_, _, _, root, mount, *_), (system, *_, options) in mounts:
        name = "memory" if system == "cgroup" and "memory" in options.split(",") else ""
        if (name or system == "cgroup2") and name in own:
            inside = os.path.relpath(own[name], root)
            beneath = not inside.startswith("..")  # else a container's mount shows another part
            yield V1 if name else V2, mount, os.path.normpath(f"{mount}/{inside if beneath else ''}")
