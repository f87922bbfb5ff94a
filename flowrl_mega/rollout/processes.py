"""Processes of servers: ports that stay free for them, an end together with ours, and the end of all they started."""

from __future__ import annotations

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import sys
import time
from typing import TextIO

import psutil

from flowrl_mega.config import ConfigError

# Asks the kernel for SIGKILL when the parent dies, then becomes the server (SGLang's child processes do the same). It
# runs on all cores that the job has: srun gives rank 0, which starts it, only a share of them.
END_WITH_PARENT = """
import ctypes, os, sys
if sys.platform == "linux":
    ctypes.CDLL(None).prctl(1, 9)
    os.sched_setaffinity(0, range(os.cpu_count()))
if os.getppid() != int(sys.argv[1]):
    sys.exit("the process that started this server is gone")
os.execvp(sys.argv[2], sys.argv[2:])
"""


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens on, below the range from which the kernel takes ports for outgoing connections, so that
    a restarted server finds its port free again. Raises ConfigError."""
    candidates = random.SystemRandom().sample(range(20000, 32000), 1000)
    ports = list(itertools.islice((port for port in candidates if is_free("127.0.0.1", port)), count))
    if len(ports) < count:
        raise ConfigError(f"rollout.servers = {count}: not so many free ports from 20000 to 32000; take fewer servers")
    return ports


def is_free(host: str, port: int) -> bool:
    """Whether a server could listen there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True


def popen(words: list[str], environment: dict[str, str], log: TextIO) -> subprocess.Popen[bytes]:
    """Start a command in a session of its own; the kernel kills it when the calling *thread* ends."""
    boot = [sys.executable, "-I", "-S", "-c", END_WITH_PARENT, str(os.getpid())]
    return subprocess.Popen(
        [*boot, *words], env=environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
    )


def kill(process: subprocess.Popen[bytes], timeout_s: float = 10.0) -> None:
    """Kill a server and all its processes, also stopped ones, and wait until they and their resources are gone."""
    members = family(process)
    for member in members:
        with contextlib.suppress(psutil.NoSuchProcess):
            member.kill()
    process.wait()
    end = time.monotonic() + timeout_s
    while time.monotonic() < end and any(_is_there(member) for member in members):
        time.sleep(0.02)


def family(process: subprocess.Popen[bytes]) -> list[psutil.Process]:
    """A server's processes: those in its session, which is known even after the server has died, and their children."""
    if process.poll() is not None and psutil.pid_exists(process.pid):
        return []  # reused by another process: pids are not reused as long as the session has a process
    members: dict[int, psutil.Process] = {}
    for other in psutil.process_iter():
        with contextlib.suppress(ProcessLookupError, psutil.NoSuchProcess):
            if os.getsid(other.pid) == process.pid and _is_there(other):
                members |= {member.pid: member for member in (other, *other.children(recursive=True))}
    return list(members.values())


def _is_there(member: psutil.Process) -> bool:
    """Whether a process is alive. In a container a zombie may stay for ever, as no parent asks for its exit code."""
    try:
        return member.is_running() and member.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def ending(process: subprocess.Popen[bytes]) -> str:
    """How a process ended, in words."""
    code = process.returncode
    return f"exit code {code}" if code >= 0 else f"signal {signal.Signals(-code).name}"
