"""Real ranks for tests: processes that join one gloo job, stay up, and run functions sent to them.

Importing megatron costs each rank seconds, so one pool serves a whole test session. A call has a time-out; when one
rank fails, its traceback is the test's error, and all ranks are ended (the next call starts fresh ones).
"""

from __future__ import annotations

import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

from flowrl_mega.parallel.launch import free_port, rank_environment


class RankFailed(AssertionError):
    """One rank raised, died, or did not answer in time."""


def _serve(rank: int, world: int, port: int, pipe: Connection) -> None:
    os.environ.update(rank_environment(rank, world, port))
    import torch

    torch.set_num_threads(1)
    while True:
        try:
            function, args, kwargs = _receive(pipe)
        except EOFError:
            return
        try:
            _send(pipe, ("done", function(*args, **kwargs)))
        except BaseException:
            _send(pipe, ("failed", traceback.format_exc()))


def _send(pipe: Connection, item: Any) -> None:
    """As plain bytes: `pipe.send` would hand tensors over as open files, one more connection for each."""
    pipe.send_bytes(pickle.dumps(item))


def _receive(pipe: Connection) -> Any:
    return pickle.loads(pipe.recv_bytes())


class RankPool:
    """`run(function, ...)` on `world` ranks gives each rank's result, by rank."""

    def __init__(self, world: int) -> None:
        self.world = world
        self.ranks: list[Any] = []
        self.pipes: list[Connection] = []

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        if not self.ranks:
            self._start()
            timeout += 60  # the first call imports torch and megatron
        for rank, pipe in enumerate(self.pipes):
            try:
                _send(pipe, (function, args, kwargs))
            except OSError:
                self._fail(f"rank {rank} died before the call")
        results: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(results) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.world) if rank not in results]
                self._fail(f"ranks {missing} did not answer within {timeout:g} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    status, value = _receive(self.pipes[rank])
                except (EOFError, OSError):
                    self._fail(f"rank {rank} died")
                if status == "failed":
                    self._fail(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world)]

    def _start(self) -> None:
        context, port = multiprocessing.get_context("spawn"), free_port()
        for rank in range(self.world):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, self.world, port, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append(process)
            self.pipes.append(ours)

    def _fail(self, message: str) -> None:
        self.close()
        raise RankFailed(message)

    def close(self) -> None:
        """End all ranks."""
        for process in self.ranks:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.ranks, self.pipes = [], []
