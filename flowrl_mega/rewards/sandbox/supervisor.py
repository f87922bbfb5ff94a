"""One program's supervisor: starts it in its jail, holds the limits that the kernel does not, ends all of it.

It tells the worker how the program ended by one JSON message on the control socket. The worker ends a program by
closing its end of that socket, on purpose or by dying. stdlib only.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import json
import os
import select
import signal
import socket
import tempfile
import time
import traceback
from typing import NoReturn

import cgroup  # type: ignore[import-not-found]
import inside  # type: ignore[import-not-found]
import jail  # type: ignore[import-not-found]
import packages  # type: ignore[import-not-found]
import removal  # type: ignore[import-not-found]

FIRST_LOOK, LOOK = 0.02, 0.05  # seconds from the start to the first count of a program's processes; then between two
WALLS = 4  # times its wall time that a program may have on a busy machine; client.py waits as long
LAST_FD = 1 << 16
CLOCK, PAGE = os.sysconf("SC_CLK_TCK"), os.sysconf("SC_PAGE_SIZE")


Paths = list[tuple[str, str]]  # each with the same without links


def run(message: bytes, fds: list[int], interpreter: Paths, modules: Paths, place: cgroup.Place | None) -> NoReturn:
    """Everything of one request; ends this process."""
    try:
        request = json.loads(message)
        control, *streams = fds
        end = Supervisor(request, interpreter, modules, place).supervise(control, streams)
        os.write(control, word(**end))
    except BrokenPipeError:
        pass  # the worker has gone, or does not want to know
    except BaseException:
        os.write(fds[0], word("refused", why=traceback.format_exc(limit=-3)[-2000:]))
    finally:
        os._exit(0)


def word(end: str, **more: str | int) -> bytes:
    """What the worker is told of a program's end: one line."""
    return json.dumps({"end": end, **more}).encode() + b"\n"


class Supervisor:
    def __init__(self, request: dict, interpreter: Paths, modules: Paths, place: cgroup.Place | None = None) -> None:
        self.limits = request["limits"]
        self.way = request["way"]  # "root" or "user": namespaces made with or without root's rights; "process"
        self.outside_id = other_id() if has_own_user(self.way, interpreter) else None
        self.paths, self.modules = interpreter, modules
        self.place = place
        self.group: cgroup.Group | None = None  # the server removes it
        self.foreign: set[str] = set()  # processes seen that are not the program's

    def supervise(self, control: int, streams: list[int]) -> dict:
        """Runs the program to its end; how it ended, when nothing of it is left."""
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.set_wakeup_fd(-1)
        os.setsid()
        exposed = self.way == "process" and not self.outside_id  # the program is of this process's user
        self.limits["count_processes"] = not exposed
        jail.prctl(jail.PR_SET_DUMPABLE, not exposed)  # else it may write into this process and its pipes
        folder = None
        try:
            if self.way == "process":
                folder = tempfile.mkdtemp(prefix=folder_name(os.getpid()))
                if self.outside_id:
                    os.chown(folder, self.outside_id, self.outside_id)
            first, news = self.start(streams, folder or "/tmp")
            try:
                end = self.watch(first, control, news)
            finally:
                seconds = self.end_all(first)
        finally:
            if folder:
                removal.remove(folder)
        said = os.read(news, 4096)  # what came before the end
        return self.outcome(end, said, seconds)

    def start(self, streams: list[int], folder: str) -> tuple[int, int]:
        """The first process of the program (its namespaces' init) and a pipe with news: "status N" or a refusal."""
        door = None
        if self.place:
            memory = (self.limits["memory_mb"] << 20) + os.fstat(streams[0]).st_size  # of which it has a copy
            self.group = self.place.make(os.getpid(), memory, self.limits["processes"] + 2)
            door = self.group.door()
        news, tell = os.pipe()
        here, there = socket.socketpair()
        if self.way == "user":
            user, group = os.geteuid(), os.getegid()
            jail.unshare(jail.NEWUSER | jail.NEWPID)
            jail.map_ids("self", jail.INSIDE_ID, user, group)
        elif self.way == "root":
            jail.unshare(jail.NEWPID)
        else:
            jail.prctl(jail.PR_SET_SUBREAPER, 1)  # daemons become our children, not init's
        first = self.group.fork(door) if self.group and door is not None else jail.fork()
        if first == 0:
            here.close()
            self.become(tell, streams, folder, there)
        there.close()
        for fd in (tell, *streams, *([] if door is None else [door])):
            os.close(fd)
        if self.way == "root" and here.recv(1):
            jail.map_ids(first, jail.INSIDE_ID, self.outside_id, self.outside_id)
            here.send(b"m")
        here.close()
        return first, news

    def become(self, tell: int, streams: list[int], folder: str, parent: socket.socket) -> NoReturn:
        """The first process: makes the jail, starts the program in it and waits; or says on `tell` why not."""
        try:
            # The kernel drops what a program sends to its namespaces' init, but for signals that this has a handler of.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            if self.way != "process":
                self.enter(parent, streams[0])
            # A change of user forgets it, so not before. Daemons become this process's children, also without a
            # namespace whose init it is.
            jail.prctl(jail.PR_SET_PDEATHSIG, jail.KILL)
            jail.prctl(jail.PR_SET_SUBREAPER, 1)
            program = os.fork()
            if program == 0:
                self.drop_and_run(tell, streams, folder)
            os.closerange(0, tell)
            os.closerange(tell + 1, LAST_FD)
            while True:
                process, status = os.wait()
                if process == program:
                    os.write(tell, b"status %d" % status)
                    os._exit(0)
        except BaseException:
            os.write(tell, b"refused " + traceback.format_exc(limit=-3)[-2000:].encode())
        finally:
            os._exit(1)

    def enter(self, parent: socket.socket, stdin: int) -> None:
        """Into namespaces of its own, with a root of its own, as a user who is nobody outside."""
        jail.unshare(jail.NEWNS | jail.NEWIPC | jail.NEWUTS | jail.NEWNET | jail.NEWCGROUP)
        jail.build_root(self.paths, self.modules, self.limits["disk_mb"], stdin)
        packages.found_in(jail.MODULES)
        jail.check(jail.libc.sethostname(b"sandbox", 7), "sethostname")
        if self.way == "root":  # the namespaces above stay root's, and its own gives no right to them
            jail.unshare(jail.NEWUSER)
            parent.send(b"?")
            if not parent.recv(1):
                os._exit(1)
        os.setresgid(*[jail.INSIDE_ID] * 3)
        os.setresuid(*[jail.INSIDE_ID] * 3)

    def drop_and_run(self, tell: int, streams: list[int], folder: str) -> NoReturn:
        """The program's own process, from here on without rights."""
        try:
            tell = fcntl.fcntl(tell, fcntl.F_DUPFD, 64)  # out of the streams' way
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.setsid()
            os.chdir(folder)
            os.umask(0o077)
            if self.way == "process" and self.outside_id:
                os.setgroups([])
                os.setresgid(*[self.outside_id] * 3)
                os.setresuid(*[self.outside_id] * 3)
            jail.prctl(jail.PR_SET_PDEATHSIG, jail.KILL)  # again: a change of user forgets it
            inside.take_streams(streams)
            jail.limit(self.limits)
            jail.drop_privileges()
            os.closerange(inside.CHANNEL + 1, LAST_FD)
            inside.run(folder)  # never returns
        except BaseException:
            os.write(tell, b"refused " + traceback.format_exc(limit=-3)[-2000:].encode())
        finally:
            os._exit(1)

    def watch(self, first: int, control: int, news: int) -> str:
        """Waits for the program's end, the worker's, or a limit passed; which of them it was.

        A busy machine may wake this process long after the wall time: whatever else has happened by then came first.
        """
        poll = select.poll()
        poll.register(control, select.POLLIN)
        poll.register(news, select.POLLIN)
        started = time.monotonic()
        wait = FIRST_LOOK
        while True:
            left = self.left(started, first)
            events = [fd for fd, _ in poll.poll(max(0.0, min(wait, left)) * 1000)]
            if control in events:
                return "closed"
            if news in events:
                return "itself"
            before = time.monotonic()
            passed = self.passed(first)
            if passed or left <= 0:
                return passed or "wall"
            # On machines with thousands of processes a look takes long; it may take a twentieth of the time.
            wait = max(LOOK, 20 * (time.monotonic() - before))

    def left(self, started: float, first: int) -> float:
        """Seconds of wall time that are left, not counting those in which the program waited for a processor that
        others had: up to WALLS times the limit, a verdict does not depend on how busy the machine is."""
        wall = self.limits["wall_s"]
        left = started + wall - time.monotonic()
        return left if left > 0 else left + min(sum(map(waited, self.family(first)[0])), (WALLS - 1) * wall)

    def passed(self, first: int) -> str | None:
        """The limit that all processes of the program together have passed."""
        threads, seconds, memory = self.count(first)
        if threads > self.limits["processes"] + 2:
            return "processes"
        if seconds > self.limits["cpu_s"]:
            return "cpu"
        too_much = self.group.kills() if self.group else memory > self.limits["memory_mb"] << 20
        return "memory" if too_much else None

    def count(self, first: int) -> tuple[int, float, int]:
        """Threads, CPU seconds and bytes of a process and all its descendants, beyond what it began with itself."""
        ours, facts = self.family(first)
        fields = [facts[name] for name in ours if name in facts]
        base = int(facts[str(first)][21]) if str(first) in facts else 0
        return (
            sum(int(field[17]) for field in fields),
            sum(sum(map(int, field[11:15])) for field in fields) / CLOCK,
            sum(max(0, int(field[21]) - base) for field in fields) * PAGE,
        )

    def family(self, first: int) -> tuple[set[str], dict[str, list[str]]]:
        """A process and its descendants, and the fields of /proc/PID/stat from the state on."""
        facts: dict[str, list[str]] = {}
        for name in os.listdir("/proc"):
            if name.isdigit() and name not in self.foreign:
                with contextlib.suppress(OSError):
                    facts[name] = facts_of(name)
        ours = {str(first)}
        while True:
            more = {name for name, fields in facts.items() if fields[1] in ours} - ours
            if not more:
                break
            ours |= more
        self.foreign.update(facts.keys() - ours)
        return ours, facts

    def end_all(self, first: int) -> float:
        """Kills the program and all that it started, and waits for it; CPU seconds where it ended by itself."""
        if self.way == "process" and self.outside_id and os.fork() == 0:
            with contextlib.suppress(OSError):
                os.setresuid(*[self.outside_id] * 3)
                os.kill(-1, signal.SIGKILL)  # all of this user at once: none can fork meanwhile
            os._exit(0)
        with contextlib.suppress(ProcessLookupError):
            os.kill(first, signal.SIGKILL)  # the init of a pid namespace: the kernel ends all in it first
        seconds = 0.0
        while True:
            try:
                process, _, usage = os.wait4(-1, 0 if self.way != "process" else os.WNOHANG)
            except ChildProcessError:
                return seconds
            if process == first:
                seconds = usage.ru_utime + usage.ru_stime
            if process == 0:
                self.kill_descendants()

    def kill_descendants(self) -> None:
        self.foreign.clear()
        for name in self.family(os.getpid())[0] - {str(os.getpid())}:
            with contextlib.suppress(OSError):
                os.kill(int(name), signal.SIGKILL)
        time.sleep(0.001)

    def outcome(self, end: str, said: bytes, seconds: float) -> dict:
        """What the worker is told: `end` is exit, signal, wall, cpu, memory, processes, closed or refused."""
        kind, _, rest = said.partition(b" ")
        if kind == b"refused":
            return {"end": "refused", "why": rest.decode(errors="replace")}
        if self.group and self.group.kills():  # of which of its processes is the kernel's choice
            return {"end": "memory", "code": 0}
        if end != "itself":
            return {"end": end, "code": 0}
        status = int(rest) if kind == b"status" else jail.KILL
        if os.WIFEXITED(status):
            return {"end": "exit", "code": os.WEXITSTATUS(status)}
        number = os.WTERMSIG(status)
        if number == signal.SIGXCPU or (number == jail.KILL and seconds >= self.limits["cpu_s"] - 0.1):
            return {"end": "cpu", "code": 0}
        return {"end": "signal", "code": number}


def facts_of(name: str) -> list[str]:
    """The fields of a process's stat from the state on. Of one whose main thread has left it says no memory: a thread
    that still runs says it."""
    fields = stat_fields(f"/proc/{name}/stat")
    if fields[0] == "Z" and int(fields[17]) > 1:
        for thread in os.listdir(f"/proc/{name}/task"):
            with contextlib.suppress(OSError):
                fields[21] = max(fields[21], stat_fields(f"/proc/{name}/task/{thread}/stat")[21], key=int)
    return fields


def folder_name(supervisor: int) -> str:
    """How the name of its program's folder begins, in the temporary folder of all."""
    return f"program-{os.stat('/proc/self/ns/pid').st_ino}-{supervisor}-"


def remove_folder(supervisor: int) -> None:
    """What a supervisor that was killed could not do."""
    folder = tempfile.gettempdir()
    for name in os.listdir(folder):
        if name.startswith(folder_name(supervisor)):
            removal.remove(f"{folder}/{name}")


def children(parent: int) -> set[int]:
    """All that run, or wait to be taken note of, whose parent this is."""
    found = set()
    for name in os.listdir("/proc"):
        if name.isdigit():
            with contextlib.suppress(OSError):
                if stat_fields(f"/proc/{name}/stat")[1] == str(parent):
                    found.add(int(name))
    return found


def waited(name: str) -> float:
    """Seconds that the threads of a process were ready to run and did not; 0 where the kernel does not count them."""
    total = 0
    for thread in threads_of(name):
        with contextlib.suppress(OSError, IndexError), open(f"/proc/{name}/task/{thread}/schedstat") as file:
            total += int(file.read().split()[1])
    return total / 1e9


def threads_of(name: str) -> list[str]:
    try:
        return os.listdir(f"/proc/{name}/task")
    except OSError:  # it has ended
        return []


def stat_fields(path: str) -> list[str]:
    with open(path, errors="replace") as file:  # a program may take a name that is no text
        return file.read().rpartition(")")[2].split()


def other_id() -> int:
    """A user and group that nobody has, another for each supervisor; 65534 where this user namespace ends before it."""
    own = 0x40000000 + os.getpid()
    return own if any(own in ids for ids in id_ranges()) else 65534


@functools.cache  # the server reads it, for all its forks
def id_ranges() -> list[range]:
    """The users that there are in this user namespace."""
    with open("/proc/self/uid_map") as file:
        maps = [[int(word) for word in line.split()] for line in file]
    return [range(first, first + count) for first, _, count in maps]


def has_own_user(way: str, interpreter: Paths) -> bool:
    """Whether programs run as another user than this process, on the machine's own account."""
    return os.geteuid() == 0 and (way == "root" or open_to_all(interpreter))


def open_to_all(paths: Paths) -> bool:
    """Whether any user can read the interpreter's files where they are."""
    folders = {real for _, real in paths}
    folders |= {parent for folder in folders for parent in _parents(folder)}
    return all(os.stat(folder).st_mode & 0o005 for folder in folders)


def _parents(path: str) -> list[str]:
    return [path] if path == "/" else [path, *_parents(os.path.dirname(path))]
