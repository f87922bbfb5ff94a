"""Weights to a real SGLang server, each way there is, against a bare gloo broadcast of the same bytes, in turns.

    python tools/benchmarks/sync.py [--gigabytes 0.75] [--bucket-mb 256] [--rounds 5] [--server-python PATH]
        [--transfers NAME ...] [--folder DIR] [--json FILE]

A random bf16 Qwen2, a policy of one rank and a server on this machine. A round: `broadcast` is what two processes that
do nothing else take to broadcast buffers of the buckets' sizes, `with copies` the same where the sender first copies a
bucket together and the receiver takes it into new memory and copies it out, as SGLang does. The others are a whole
`WeightSync.push`, from the pause to the version that the server then says, without checksums. Each round begins with
the next. The figures are medians over the rounds; lowest and highest stand beside them. One push of each before the
first round is not counted: it makes the group, and what the server then holds is compared with what was sent.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from convert_model import make
from workload import machine, turns, write

import flowrl_mega.parallel  # noqa: F401
from flowrl_mega.config import Config, RolloutSettings, SyncSettings
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.weights import Buckets, load_hf
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.launch import rank_environment, rendezvous_store
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.fleet import Fleet
from flowrl_mega.rollout.sglang.sync import WeightSync
from flowrl_mega.settings import validated

TRANSFERS = ("distributed", "tensor", "disk")
GOAL = 1.3  # seconds of distributed, at most, as a multiple of the broadcast's
VERSION = 1  # always: a group takes a server that says another than it was given for one that has started anew
SERVER = {"max_total_tokens": 1024, "mem_fraction_static": 0.3, "skip_server_warmup": True, "skip_tokenizer_init": True}


def main(argv: list[str] | None = None) -> None:
    options = parser().parse_args(argv)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory(dir=options.folder, prefix="sync-") as name:
        folder = Path(name)
        make(folder / "model", int(options.gigabytes * 1e9), 1 << 40)
        settings = RolloutSettings(
            engine="sglang", python=options.server_python, server_args=SERVER, start_timeout_s=options.start_timeout
        )
        fleet = Fleet(settings, folder / "model", folder / "servers", "bf16", trainer_gpus=0)
        fleet.start()
        try:
            seconds, sizes = measure(options, folder, fleet.urls[0])
        finally:
            fleet.close()
    rows = summary(seconds, sum(sizes))
    show(rows)
    header = machine("torch", "megatron-core", "safetensors", "aiohttp") | {
        "threads": torch.get_num_threads(),
        "rounds": options.rounds,
        "bytes": sum(sizes),
        "buckets": len(sizes),
        "goal": {"distributed_of_broadcast": GOAL},
    }
    write(options.json, header, rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Weights to a server against a bare broadcast of the same bytes.")
    parser.add_argument("--gigabytes", type=float, default=0.75, help="size of the model")
    parser.add_argument("--bucket-mb", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--transfers", nargs="+", choices=TRANSFERS, default=TRANSFERS)
    parser.add_argument("--server-python", default=".venv-sglang/bin/python", help="interpreter that has sglang")
    parser.add_argument("--start-timeout", type=float, default=600, help="seconds for the server to be ready")
    parser.add_argument("--folder", help="a temporary folder is made here; needs three times the model's size")
    parser.add_argument("--json")
    return parser


def measure(options: argparse.Namespace, folder: Path, url: str) -> tuple[dict[str, list[float]], list[int]]:
    """Seconds of each, by round, and the bytes of each bucket."""
    policy = build(folder / "model")
    buckets = Buckets(policy, options.bucket_mb << 20)
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets]
    loop, bare, loading = LoopThread(), Pair(sizes), Pair(sizes, load=True)
    syncs = {name: sync(name, options.bucket_mb, policy, folder, loop) for name in options.transfers}
    works: dict[str, Callable[[], float]] = {"broadcast": bare.seconds, "with copies": loading.seconds}
    server = SglangServer(url)
    for name, pushes in syncs.items():
        works[name] = Pushes(pushes, policy, server)
    try:
        for work in works.values():
            work()
        seconds: dict[str, list[float]] = {name: [] for name in works}
        for name in turns(works, options.rounds):
            seconds[name].append(works[name]())
    finally:
        bare.close()
        loading.close()
        for pushes in syncs.values():
            pushes.close()
        loop.call(server.close())
    return seconds, sizes


def build(model: Path) -> Policy:
    """The policy of the folder, in a job of this process alone."""
    os.environ.update(rank_environment(0, 1))
    tree = {
        "run_dir": "unused",
        "steps": 1,
        "model": {"path": str(model), "dtype": "bf16"},
        "data": {"task": "sums"},
        "reward": "flowrl_mega.rewards.sums:score",
    }
    config = validated(Config, tree, "")
    policy = Policy(read_architecture(model), config, layouts.init(config.parallel, config.seed), None)
    load_hf(policy, model)
    return policy


def sync(transfer: Any, bucket_mb: int, policy: Policy, folder: Path, loop: LoopThread) -> WeightSync:
    settings = SyncSettings(transfer=transfer, bucket_mb=bucket_mb)
    side_files = {"config.json": (folder / "model" / "config.json").read_bytes()}
    return WeightSync(settings, False, policy.layout, policy.arch, side_files, folder / "weights", loop)


class Pushes:
    """Calling it is one push, in seconds; the first one is checked."""

    def __init__(self, sync: WeightSync, policy: Policy, server: SglangServer) -> None:
        self.sync, self.policy, self.server = sync, policy, server
        self.checked = False

    def __call__(self) -> float:
        start = time.perf_counter()
        failures = self.sync.push(self.policy, [self.server], VERSION, check=not self.checked)
        taken = time.perf_counter() - start
        self.checked = True
        if failures:
            sys.exit(f"the server did not take the weights: {failures}")
        return taken


class Pair:
    """Two processes that broadcast buffers of these sizes when asked to; `load`: from and to other memory."""

    def __init__(self, sizes: list[int], load: bool = False) -> None:
        context, self.store = multiprocessing.get_context("spawn"), rendezvous_store()
        self.pipes: list[Connection] = []
        self.processes = []
        for rank in range(2):
            ours, theirs = context.Pipe()
            process = context.Process(target=broadcasts, args=(rank, self.store.port, sizes, load, theirs), daemon=True)
            process.start()
            self.pipes.append(ours)
            self.processes.append(process)

    def seconds(self) -> float:
        """Until both have all bytes."""
        for pipe in self.pipes:
            pipe.send(None)
        return max(pipe.recv() for pipe in self.pipes)

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()


def broadcasts(rank: int, port: int, sizes: list[int], load: bool, pipe: Connection) -> None:
    torch.set_num_threads(1)
    os.environ.update(rank_environment(rank, 2, port))
    dist.init_process_group("gloo")
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


def summary(seconds: dict[str, list[float]], size: int) -> list[dict[str, Any]]:
    rows = []
    bare = statistics.median(seconds["broadcast"])
    for name, of in seconds.items():
        median = statistics.median(of)
        row = {"transfer": name, "seconds": median, "lowest": min(of), "highest": max(of)}
        row |= {"gb_per_second": size / 1e9 / median, "of_broadcast": median / bare}
        if name == "distributed":
            row["goal_met"] = median / bare <= GOAL
        rows.append(row | {"samples": of})
    return rows


def show(rows: list[dict[str, Any]]) -> None:
    print(f"{'':<14}{'s':>8}{'lowest':>8}{'highest':>9}{'GB/s':>8}{'x broadcast':>13}")
    for row in rows:
        missed = f"  at most {GOAL:g} missed" if row.get("goal_met") is False else ""
        print(
            f"{row['transfer']:<14}{row['seconds']:>8.2f}{row['lowest']:>8.2f}{row['highest']:>9.2f}"
            f"{row['gb_per_second']:>8.2f}{row['of_broadcast']:>13.2f}{missed}"
        )


if __name__ == "__main__":
    main()
