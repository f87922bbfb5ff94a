"""The sandbox's cost a program over a bare interpreter start, programs a second, and what a trainer beside it loses.

    python tools/benchmarks/sandbox.py [--rounds 100] [--seconds 8] [--json FILE]

The program prints its input. `interpreter` is what the same interpreter takes for it, started anew with the same flags
and no isolation at all; the others are the sandbox at each level. They take turns, each round begins with the next one.
Overhead is a median minus the interpreter's. Throughput is of as many processes, each with a sandbox of its own. The
trainer is a loop of matrix products on one core: its speed alone, beside one worker that runs such programs on another,
and beside one that runs programs which compute for as long as they may.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import subprocess
import time
from collections.abc import Callable
from multiprocessing.synchronize import Event
from typing import Any

from workload import machine, turns, write

from flowrl_mega.config import CodeSettings
from flowrl_mega.rewards.sandbox.client import Sandbox, interpreter

GOAL_MS = 15.0
SOURCE = "print(input())"
BUSY = "while True: pass"
SIZE = 512
TURNS = 12  # of the trainer's three cases


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The sandbox against a bare interpreter.")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seconds", type=float, default=8.0, help="of each throughput")
    parser.add_argument("--json", help="file for the results")
    return parser


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    load = os.getloadavg()[0]
    rows = [*overheads(options.rounds), *throughputs(options.seconds), *trainer(options.seconds)]
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()))
    header = machine("torch") | {"load_before": round(load, 2), "rounds": options.rounds, "goal_ms": GOAL_MS}
    write(options.json, header, rows)


def overheads(rounds: int) -> list[dict[str, Any]]:
    """A row for each way of running the program."""
    settings = CodeSettings()
    command = [*interpreter(settings), "-c", SOURCE]

    def bare() -> None:
        done = subprocess.run(command, input="5\n", capture_output=True, text=True, env={}, check=True)
        assert done.stdout == "5\n"

    ways = ["root"] * (os.geteuid() == 0) + ["user", "process"]
    sandboxes = {way: Sandbox(settings, way) for way in ways}
    works: dict[str, Callable[[], None]] = {"interpreter": bare}
    works |= {name(way): lambda sandbox=sandbox: echo(sandbox) for way, sandbox in sandboxes.items()}
    for work in works.values():
        work()
    seconds: dict[str, list[float]] = {each: [] for each in works}
    for each in turns(works, rounds):
        start = time.perf_counter()
        works[each]()
        seconds[each].append(time.perf_counter() - start)
    for sandbox in sandboxes.values():
        sandbox.close()
    base = statistics.median(seconds["interpreter"])
    return [
        {
            "what": each,
            "ms": _ms(statistics.median(values)),
            "quartiles_ms": [_ms(part) for part in statistics.quantiles(values, n=4)[::2]],
            "overhead_ms": _ms(statistics.median(values) - base),
        }
        for each, values in seconds.items()
    ]


def name(way: str) -> str:
    return "process" if way == "process" else f"namespaces ({way})"


def echo(sandbox: Sandbox) -> None:
    assert sandbox.run(SOURCE, "5\n").stdout == "5\n"


def throughputs(seconds: float) -> list[dict[str, Any]]:
    """Programs a second of one and of two workers, at the level that this user gets."""
    rows = []
    for workers in (1, 2):
        with multiprocessing.get_context("spawn").Pool(workers) as pool:
            counts = pool.map(programs_in, [seconds] * workers, chunksize=1)
        rows.append({"what": f"{workers} workers", "programs_per_s": round(sum(counts) / seconds, 1)})
    return rows


def programs_in(seconds: float) -> int:
    """How many programs one sandbox runs in that time."""
    sandbox = Sandbox(CodeSettings(), best())
    echo(sandbox)
    end, count = time.perf_counter() + seconds, 0
    while time.perf_counter() < end:
        echo(sandbox)
        count += 1
    sandbox.close()
    return count


def best() -> str:
    return "root" if os.geteuid() == 0 else "user"


def trainer(seconds: float) -> list[dict[str, Any]]:
    """Matrix products a second alone, beside programs that print and beside programs that never end, in turns."""
    import torch  # seconds, which --help and the throughputs' workers need not wait

    torch.set_num_threads(1)
    found: dict[str, list[float]] = {"nothing": [], "programs that print": [], "programs that never end": []}
    context = multiprocessing.get_context("spawn")
    for _ in range(TURNS):
        for beside, source in (("nothing", None), ("programs that print", SOURCE), ("programs that never end", BUSY)):
            stop, ready = context.Event(), context.Event()
            worker = context.Process(target=run_until, args=(source, stop, ready)) if source else None
            if worker:
                worker.start()
                ready.wait()
            found[beside].append(products(seconds / TURNS))
            stop.set()
            if worker:
                worker.join()
    alone = statistics.median(found["nothing"])
    return [
        {
            "what": f"trainer beside {beside}",
            "of_alone": round(statistics.median(values) / alone, 3),
            "quartiles": [round(part / alone, 3) for part in statistics.quantiles(values, n=4)[::2]],
        }
        for beside, values in found.items()
    ]


def run_until(source: str, stop: Event, ready: Event) -> None:
    sandbox = Sandbox(CodeSettings(wall_s=0.5), best())
    echo(sandbox)
    ready.set()
    while not stop.is_set():
        sandbox.run(source, "5\n")
    sandbox.close()


def products(seconds: float) -> float:
    """Products a second of two square matrices, on this thread."""
    import torch

    left, right = torch.randn(SIZE, SIZE), torch.randn(SIZE, SIZE)
    start, count = time.perf_counter(), 0
    while time.perf_counter() - start < seconds:
        torch.mm(left, right)
        count += 1
    return count / (time.perf_counter() - start)


def _ms(seconds: float) -> float:
    return round(seconds * 1e3, 2)


if __name__ == "__main__":
    main()
