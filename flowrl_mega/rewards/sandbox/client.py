"""The worker's side of the sandbox: one fork server, and programs that it starts, fed and read without blocking."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import selectors
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_mega.config import CodeSettings, ConfigError
from flowrl_mega.rewards.sandbox import packages
from flowrl_mega.rewards.sandbox.codec import HEADER

LIMITS = ("wall_s", "cpu_s", "memory_mb", "disk_mb", "processes", "open_files")
WALLS = 4  # times its wall time that a program may have where others take the processors: see supervisor.py
GRACE = 10.0  # seconds beyond that after which its supervisor must have answered
CHUNK = 1 << 16
SERVER = Path(__file__).with_name("server.py")
REFUSED: dict[str, Any] = {"end": "refused", "why": "its supervisor and the fork server were killed"}
FRAME = 64  # bytes that a waiting frame takes besides its own


class SandboxError(Exception):
    """The sandbox itself did not work; it says nothing about the program."""


@dataclass(frozen=True)
class Outcome:
    """How a program ended, and what it wrote."""

    end: str  # exit, signal, wall, cpu, memory, processes, flood or supervisor (which the program has killed)
    code: int  # exit status, or number of the signal
    stdout: str
    stderr: str


class Sandbox:
    """Starts programs in one way: "root" or "user" (namespaces, with or without root's rights), or "process".

    The server is started by exec: it has nothing of this process's memory, environment or file descriptors.
    """

    def __init__(self, settings: CodeSettings, way: str) -> None:
        self.settings = settings
        self.way = way
        self._requests, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._server = subprocess.Popen(
                [*interpreter(settings), str(SERVER), str(theirs.fileno()), *package_paths(settings)],
                env={"PATH": "/usr/bin:/bin", "LANG": "C.UTF-8"},
                cwd="/",
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                pass_fds=[theirs.fileno()],
                start_new_session=True,
            )

    def start(self, stdin: str = "", **request: Any) -> Program:
        """A program: `parts` of source (stubs, then its own), `mode` (see inside.py) and what that mode reads."""
        return Program(self._requests, self.settings, self.way, request, stdin)

    def run(self, code: str, stdin: str, prelude: bool = False) -> Outcome:
        """A whole program with this standard input."""
        with self.start(stdin, mode="stdin", parts=[code], prelude=prelude) as program:
            advance([program], lambda: program.ended)
            return program.outcome()

    def memory(self) -> str:
        """Which cgroups hold the memory of programs: v1, v2, or "" where none do. Asked once."""
        return json.loads(self._requests.recv(CHUNK) or b"{}").get("memory", "")

    def alive(self) -> bool:
        """Whether its server can start programs. One that has been stopped, as a program without a user of its own can,
        is ended: it would not answer, and never be replaced."""
        with contextlib.suppress(OSError):
            if Path(f"/proc/{self._server.pid}/stat").read_text().rpartition(")")[2].split()[0] == "T":
                self._server.kill()
                self._server.wait()
        return self._server.poll() is None

    def close(self) -> None:
        self._requests.close()
        self._server.wait()


def interpreter(settings: CodeSettings) -> list[str]:
    """The command of the programs' interpreter. One that was chosen keeps its site-packages: that is why it was."""
    if settings.python:
        return [settings.python, "-I", "-B"]
    return [getattr(sys, "_base_executable", None) or sys.executable, "-I", "-S", "-B"]


def package_paths(settings: CodeSettings) -> list[str]:
    """Where the modules lie that programs may import. ConfigError: one is not installed."""
    try:
        return [] if settings.python else packages.find(settings.packages)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"reward.code.packages: {error} is no module of this environment; install it here, leave it out, or give "
            "reward.code.python, an interpreter that has it"
        ) from None


class Program:
    """A running program: its streams, the channel's frames, and how it ended. Closing it ends it."""

    def __init__(
        self, requests: socket.socket, settings: CodeSettings, way: str, request: dict[str, Any], stdin: str
    ) -> None:
        self.frames: deque[bytes] = deque()
        self.ended = False
        self._settings = settings
        self._output = {"stdout": bytearray(), "stderr": bytearray()}
        self._partial = bytearray()  # of a frame
        self._flood = False
        self._end: dict[str, Any] | None = None
        self._deadline = time.monotonic() + WALLS * settings.wall_s + GRACE
        self._control, control = socket.socketpair()
        self._channel, channel = socket.socketpair()
        outputs, errors = os.pipe(), os.pipe()
        inputs = _sealed_file(stdin)
        self.readers: dict[int, str] = {outputs[0]: "stdout", errors[0]: "stderr"}
        self.readers |= {self._channel.fileno(): "channel", self._control.fileno(): "control"}
        self.pending: dict[int, bytearray] = {self._channel.fileno(): bytearray()}
        limits = {name: getattr(settings, name) for name in LIMITS}
        theirs = [control.fileno(), inputs, outputs[1], errors[1], channel.fileno()]
        failed = None
        try:
            message = json.dumps({"way": way, "limits": limits}).encode()
            socket.send_fds(requests, [message], theirs)
        except OSError as error:
            failed = error
        control.close()
        channel.close()
        for fd in (inputs, outputs[1], errors[1]):
            os.close(fd)
        if failed:
            self.close()  # after `control`, whose end it waits for
            raise SandboxError(f"the sandbox's fork server has ended ({failed})") from failed
        for fd in (*self.readers, *self.pending):
            os.set_blocking(fd, False)
        self.send(json.dumps(request).encode())

    def __enter__(self) -> Program:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def send(self, frame: bytes) -> None:
        """One frame for the channel."""
        self.pending[self._channel.fileno()] += HEADER.pack(len(frame)) + frame
        self._write(self._channel.fileno())

    def outcome(self) -> Outcome:
        """How it ended. SandboxError: it was never started."""
        end = self._end or REFUSED
        if end["end"] == "refused":
            raise SandboxError(f"the sandbox could not be made: {end['why'].strip()}")
        texts = {name: data.decode("utf-8", "replace") for name, data in self._output.items()}
        return Outcome("flood" if self._flood else end["end"], end.get("code", 0), **texts)

    def handle(self, fd: int) -> None:
        """Moves what can be moved through one of its file descriptors."""
        if self.pending.get(fd):
            self._write(fd)
        if fd in self.readers:
            self._read(fd)

    def _write(self, fd: int) -> None:
        data = self.pending[fd]
        try:
            del data[: os.write(fd, data[: 1 << 20]) if data else 0]
        except BlockingIOError:
            return
        except OSError:  # it does not read any more; how it ended will say why
            data.clear()

    def _read(self, fd: int) -> bool:
        """Takes what can be read at once; whether there was anything."""
        name = self.readers[fd]
        try:
            data = os.read(fd, CHUNK)
        except BlockingIOError:
            return False
        except OSError:
            data = b""
        if name == "control":
            self._ends(data)
        elif not data:
            del self.readers[fd]
            if name != "channel":
                os.close(fd)
        elif name == "channel":
            self._take(data)
        else:
            self._output[name] += data
            self._limit(sum(map(len, self._output.values())))
        return bool(data)

    def _ends(self, message: bytes) -> None:
        self._end = json.loads(message.splitlines()[0]) if message else REFUSED
        self.ended = True  # nothing of it is left: what its pipes hold is the last of it
        for fd in [fd for fd, name in self.readers.items() if name != "control"]:
            while fd in self.readers and not self._flood and self._read(fd):
                pass

    def _take(self, data: bytes) -> None:
        """Whole frames out of what came through the channel."""
        self._partial += data
        while len(self._partial) >= HEADER.size and not self._flood:
            size = HEADER.size + HEADER.unpack_from(self._partial)[0]
            self._limit(size)
            if len(self._partial) < size:
                break
            self.frames.append(bytes(self._partial[HEADER.size : size]))
            del self._partial[:size]
        self._limit(sum(FRAME + len(frame) for frame in self.frames))  # answers that nobody asked for

    def _limit(self, size: int) -> None:
        if size > self._settings.output_kb << 10 and not self._flood:
            self._flood = True
            self._control.shutdown(socket.SHUT_WR)  # the supervisor ends it

    def overdue(self) -> bool:
        return time.monotonic() > self._deadline

    def close(self) -> None:
        """Ends it, if it still runs, and waits until nothing of it is left."""
        with contextlib.suppress(OSError):  # the supervisor has gone already
            self._control.shutdown(socket.SHUT_WR)  # which it takes for "end it"
            self._control.settimeout(GRACE)
            while self._control.recv(CHUNK):
                pass
        for fd in {*self.readers, *self.pending} - {self._channel.fileno(), self._control.fileno()}:
            with contextlib.suppress(OSError):
                os.close(fd)
        self.readers.clear()
        self.pending.clear()
        self._channel.close()
        self._control.close()


def _sealed_file(text: str) -> int:
    """A file of memory that nobody can write in any more: a program may ask for its length, and go back."""
    fd = os.memfd_create("stdin", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    with open(fd, "wb", closefd=False) as file:
        file.write(text.encode("utf-8", "surrogateescape"))
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_SEAL)
    os.lseek(fd, 0, os.SEEK_SET)
    return fd


def advance(programs: Sequence[Program], until: Callable[[], bool]) -> None:
    """Moves the streams of all `programs` until the condition holds or all have ended."""
    while not until() and not all(program.ended for program in programs):
        with selectors.PollSelector() as poll:
            for program in programs:
                _register(poll, program)
            for key, _ in poll.select(1.0):
                if key.fd in key.data.readers or key.fd in key.data.pending:
                    key.data.handle(key.fd)
        if any(program.overdue() and not program.ended for program in programs):
            raise SandboxError("the sandbox's supervisor did not answer in time")


def _register(poll: selectors.PollSelector, program: Program) -> None:
    if program.ended:
        return
    for fd in {*program.readers, *(fd for fd, data in program.pending.items() if data)}:
        reads = selectors.EVENT_READ if fd in program.readers else 0
        writes = selectors.EVENT_WRITE if program.pending.get(fd) else 0
        poll.register(fd, reads | writes, program)
