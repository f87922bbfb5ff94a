"""Rewards in processes of their own: in parallel, and so that one that hangs or crashes ends nothing but itself.

Not a pool of a library: concurrent.futures cannot end a call, and pebble's pool breaks when a worker dies idle.
"""

from __future__ import annotations

import contextlib
import queue
import socket
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any

from flowrl_mega.config import RewardSettings
from flowrl_mega.rewards.load import Score, load_reward

START = "import sys; sys.path[:] = {path!r}; from flowrl_mega.rewards.worker import main; main({descriptor})"
START_S = 120.0  # for a worker to import what the reward needs


class Pool:
    """`submit` may be called from any thread; the futures can be cancelled while they wait."""

    def __init__(self, settings: RewardSettings, workers: int) -> None:
        of_failed = load_reward(settings).of_failed
        self._workers = [_Worker(settings, of_failed) for _ in range(workers)]
        self._idle: queue.SimpleQueue[_Worker] = queue.SimpleQueue()
        for worker in self._workers:
            self._idle.put(worker)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="reward")

    def submit(self, row: dict[str, Any], response: str) -> Future[Score]:
        return self._threads.submit(self._score, row, response)

    def close(self) -> None:
        """End the workers, whatever they are at."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()

    def _score(self, row: dict[str, Any], response: str) -> Score:
        worker = self._idle.get()
        try:
            return worker.ask(row, response)
        finally:
            self._idle.put(worker)


class _Worker:
    """One process, started again where it had to be ended."""

    def __init__(self, settings: RewardSettings, of_failed: Callable[[dict[str, Any]], float]) -> None:
        self.settings, self.of_failed = settings, of_failed
        self.closed = False
        self._start()

    def ask(self, row: dict[str, Any], response: str) -> Score:
        """The score. A crash is tried once more, in a new process: memory may have been short, or the row before it
        may have done the harm."""
        code: int | None = None
        for _ in range(2):
            try:
                self._wait_until_ready()
                self.connection.send((row, response))
                if self.connection.poll(self.settings.timeout_s):
                    return self.connection.recv()
                self._restart()
                message = f"no verdict after {self.settings.timeout_s:g} s (reward.timeout_s)"
                return Score(self.of_failed(row), message, failed=True, kind="time-out")
            except (EOFError, OSError):
                code = self._restart()
        message = f"the reward's process ended twice (exit code {code})"
        return Score(self.of_failed(row), message, failed=True, kind="crash")

    def close(self) -> None:
        self.closed = True
        self.process.kill()
        self.process.wait()

    def _start(self) -> None:
        ours, theirs = socket.socketpair()
        with theirs:
            command = START.format(path=sys.path, descriptor=theirs.fileno())
            arguments = [sys.executable, "-c", command]
            self.process = subprocess.Popen(arguments, stdin=subprocess.DEVNULL, pass_fds=[theirs.fileno()])
        self.connection, self.is_ready = Connection(ours.detach()), False
        with contextlib.suppress(OSError):  # it has ended already: `ask` will see
            self.connection.send(self.settings)

    def _wait_until_ready(self) -> None:
        if not self.is_ready:
            if not self.connection.poll(START_S):
                raise EOFError
            self.connection.recv()
            self.is_ready = True

    def _restart(self) -> int:
        """The exit code of the process that was."""
        self.connection.close()
        if self.process.poll() is None:
            self.process.kill()
        code = self.process.wait()
        if not self.closed:
            self._start()
        return code
