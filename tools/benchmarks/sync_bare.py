"""What sync.py compares with: two processes that broadcast buffers and do nothing else."""

from __future__ import annotations

import multiprocessing
import time
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist


class Pair:
    """Two processes that broadcast buffers of these sizes (bytes) when asked to; `load`: from and to other memory.

    They meet through `file`, which must not exist yet.
    """

    def __init__(self, sizes: list[int], file: Path, load: bool = False) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=broadcasts, args=(rank, file, sizes, load, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def seconds(self) -> float:
        """Broadcast once; returns the time until both have all bytes."""
        for pipe in self.pipes:
            pipe.send(None)
        return max(pipe.recv() for pipe in self.pipes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def broadcasts(rank: int, file: Path, sizes: list[int], load: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    weights = [torch.full((size,), rank, dtype=torch.uint8) for size in sizes]
    buffer = torch.ones(max(sizes), dtype=torch.uint8)
    while True:
        try:
            pipe.recv()
        except EOFError:
            return
        dist.barrier()
        start = time.perf_counter()
        for weight in weights:
            if not load:
                dist.broadcast(weight, 0)
            elif rank == 0:
                part = buffer[: len(weight)]
                dist.broadcast(part.copy_(weight), 0)
            else:
                dist.broadcast(received := torch.empty_like(weight), 0)
                weight.copy_(received)
        pipe.send(time.perf_counter() - start)
