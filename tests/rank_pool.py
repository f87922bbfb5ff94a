"""Real ranks for tests: processes that join one gloo job, stay up, and run functions sent to them.

Importing megatron costs each rank seconds, so one pool serves a whole test session. A call has a time-out; when one
rank fails, its traceback is the test's error, and all ranks are ended (the next call starts fresh ones).
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import pickle
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from typing import Any

import torch

# Importing torch and megatron costs a process seconds: ranks are forked from a server that has done it once. But not
# where there is a GPU: the server has asked for it, and CUDA does not work in what is forked after that.
FORKSERVER = multiprocessing.get_context("spawn" if torch.cuda.is_available() else "forkserver")
FORKSERVER.set_forkserver_preload(["flowrl_mega.job", "aiohttp.web"])


class RankFailed(AssertionError):
    """One rank raised, died, or did not answer in time."""


def _serve(environment: dict[str, str], megatron: bool, pipe: Connection) -> None:
    os.environ.update(environment)
    if megatron:
        import flowrl_mega.parallel  # noqa: F401
    torch.set_num_threads(1)
    gc.freeze()  # what was imported stays: without this a collection between two jobs takes half a second a rank
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
    """`run(function, ...)` on `world` ranks gives each rank's result, by rank.

    Without `megatron` the ranks start in half the time, but no tensors can be sent to them: Megatron, which is in the
    process that sends them, makes itself part of how torch pickles. `context` is multiprocessing's, of other processes
    that have imported Megatron.
    """

    def __init__(self, world: int, megatron: bool = True, context: Any = None) -> None:
        self.world, self.megatron = world, megatron
        self.context: Any = context or (FORKSERVER if megatron else multiprocessing.get_context("spawn"))
        self.ranks: list[Any] = []
        self.pipes: list[Connection] = []
        self.store: torch.distributed.TCPStore | None = None  # where the ranks meet

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 120, **kwargs: Any) -> list[Any]:
        if not self.ranks:
            self._start()
            timeout += 60  # the first call imports torch and megatron
        try:
            return self._run(function, args, kwargs, timeout)
        except BaseException:  # also a time-out of pytest's: what the ranks are at is no answer to the next call
            self.close()
            raise

    def _run(self, function: Callable[..., Any], args: Any, kwargs: dict[str, Any], timeout: float) -> list[Any]:
        for rank, pipe in enumerate(self.pipes):
            try:
                _send(pipe, (function, args, kwargs))
            except OSError as error:
                raise RankFailed(f"rank {rank} died before the call") from error
        results: dict[int, Any] = {}
        end = time.monotonic() + timeout
        while len(results) < self.world:
            waiting = [pipe for rank, pipe in enumerate(self.pipes) if rank not in results]
            ready = wait(waiting, timeout=max(0.0, end - time.monotonic()))
            if not ready:
                missing = [rank for rank in range(self.world) if rank not in results]
                raise RankFailed(f"ranks {missing} did not answer within {timeout:g} s")
            for pipe in ready:
                rank = self.pipes.index(pipe)  # type: ignore[arg-type]
                try:
                    status, value = _receive(self.pipes[rank])
                except (EOFError, OSError) as error:
                    raise RankFailed(f"rank {rank} died") from error
                if status == "failed":
                    raise RankFailed(f"rank {rank} failed:\n{value}")
                results[rank] = value
        return [results[rank] for rank in range(self.world)]

    def _start(self) -> None:
        from flowrl_mega.parallel.launch import (
            rank_environment,
            rendezvous_store,
        )  # not in the ranks: it imports Megatron

        self.store = rendezvous_store()
        for rank in range(self.world):
            ours, theirs = self.context.Pipe()
            environment = rank_environment(rank, self.world, self.store.port)
            process = self.context.Process(target=_serve, args=(environment, self.megatron, theirs), daemon=True)
            process.start()
            theirs.close()
            self.ranks.append(process)
            self.pipes.append(ours)

    def close(self) -> None:
        """End all ranks."""
        for process in self.ranks:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()
        self.ranks, self.pipes, self.store = [], [], None
