"""What a program may not change: facts about this machine before and after it."""

from __future__ import annotations

import ctypes
import os
import resource
import shutil
import socket
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest

from flowrl_mega.config import CodeSettings
from flowrl_mega.rewards.sandbox import client
from flowrl_mega.rewards.sandbox.client import Sandbox

PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h
COUNTS = ("open files", "threads", "shared memory")  # in `state`
MARK = "hostile-was-here"
SYSTEM_PYTHON = Path("/usr/bin/python3")
NOBODY = 65534


@dataclass
class Watch:
    """Listeners and a secret that no program may reach, and what is checked after each."""

    folder: Path
    tcp: socket.socket
    udp: socket.socket
    abstract: socket.socket

    def facts(self, server: int) -> dict[str, Any]:
        """What a hostile program is told, so that it need not guess."""
        return {
            "pid": os.getpid(),
            "server": server,
            "secret": str(self.folder / "secret.txt"),
            "folder": str(self.folder),
            "repository": str(Path(__file__).parents[2]),
            "port": self.tcp.getsockname()[1],
            "udp": self.udp.getsockname()[1],
            "abstract": self.abstract.getsockname()[1:].decode(),
        }

    def heard(self) -> list[str]:
        """Which listeners were reached."""
        found = []
        for name, listener in (("tcp", self.tcp), ("abstract", self.abstract)):
            try:
                listener.accept()[0].close()
                found.append(name)
            except BlockingIOError:
                pass
        try:
            self.udp.recv(100)
            found.append("udp")
        except BlockingIOError:
            pass
        return found

    def written(self) -> list[str]:
        """Files of a hostile program's outside its own folder."""
        places = [self.folder, Path(__file__).parents[2], Path.cwd(), Path.home()]
        places += map(Path, "/ /tmp /var/tmp /dev /dev/shm /usr /usr/lib /etc /home".split())
        found = [str(place / MARK) for place in places if (place / MARK).exists()]
        return found + [entry.name for entry in self.folder.iterdir() if entry.name != "secret.txt"]


@contextmanager
def watching(folder: Path) -> Iterator[Watch]:
    (folder / "secret.txt").write_text("nobody's to read")
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as udp,
        socket.socket(socket.AF_UNIX) as abstract,
    ):
        udp.bind(("127.0.0.1", 0))
        abstract.bind(f"\0flowrl-mega-{os.getpid()}")
        abstract.listen()
        for listener in (tcp, udp, abstract):
            listener.setblocking(False)
        yield Watch(folder, tcp, udp, abstract)


@contextmanager
def opened(limits: CodeSettings, way: str) -> Iterator[Sandbox]:
    """A sandbox of this way, where this user can make one."""
    if way == "root" and os.geteuid() != 0:
        pytest.skip("not root")
    sandbox = Sandbox(limits, way)
    yield sandbox
    sandbox.close()


def as_nobody(work: Callable[[dict[str, Any]], None], folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Runs `work` in a child that is a user without rights, and passes on whether it raised. It gets the settings with
    which a sandbox works there: an interpreter that this user can read; so can it the sandbox, by a copy."""
    if os.geteuid() != 0 or not SYSTEM_PYTHON.exists():
        pytest.skip(f"needs root, to become another user, and {SYSTEM_PYTHON}")
    package = folder / "sandbox"
    shutil.copytree(Path(client.__file__).parent, package)
    for place in (package, *package.parents[:3]):
        place.chmod(0o755)
    monkeypatch.setattr(client, "SERVER", package / "server.py")
    child = os.fork()
    if child == 0:
        status = 1
        try:
            os.setgroups([])
            os.setresgid(*[NOBODY] * 3)
            os.setresuid(*[NOBODY] * 3)
            work({"python": str(SYSTEM_PYTHON)})
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def programs() -> set[int]:
    """Processes that run and that this process started, or a child of it, and so on: see `adopting_orphans`."""
    found = set()
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if process.status() != psutil.STATUS_ZOMBIE:
                found.add(process.pid)
    return found


@contextmanager
def adopting_orphans() -> Iterator[None]:
    """Meanwhile a process whose parent has died becomes this process's child, so that `programs` finds it. Of other
    people's programs, those of a second run of these tests among them, it finds none."""
    _adopt(True)
    yield
    _adopt(False)


def _adopt(yes: bool) -> None:
    assert ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, ctypes.c_ulong(yes), 0, 0, 0) == 0


def left_over(before: set[int], seconds: float = 30.0) -> set[int]:
    """Processes beside `before`, once they have had time to end; what does not end by itself sleeps for longer."""
    deadline = time.monotonic() + seconds
    while programs() - before and time.monotonic() < deadline:
        time.sleep(0.01)
    return programs() - before


def state() -> dict[str, Any]:
    """This process and this machine, as far as a program could change them and nothing else here does."""
    return {
        "environment": dict(os.environ),
        "open files": len(os.listdir("/proc/self/fd")),
        "threads": psutil.Process().num_threads(),
        "priority": os.getpriority(os.PRIO_PROCESS, 0),
        "limits": [resource.getrlimit(kind) for kind in range(16)],
        "mounts": Path("/proc/self/mountinfo").read_text(),
        "shared memory": Path("/proc/sysvipc/shm").read_text().count("\n"),
        "host name": socket.gethostname(),
    }


def changed(before: dict[str, Any]) -> dict[str, Any]:
    """What is not as it was; of counts, what has grown: what an earlier test has left may go at any time."""
    now = state()
    return {
        name: now[name] for name in now if (now[name] > before[name] if name in COUNTS else now[name] != before[name])
    }
