"""The work of sync.py: a policy in this process, its weights pushed to a server, and the bare broadcasts."""

from __future__ import annotations

import argparse
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sync_bare import Pair
from workload import in_turns

from flowrl_mega.config import Config, SyncSettings
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.weights import Buckets, load_hf
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.launch import rank_environment
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.sync import WeightSync
from flowrl_mega.settings import validated

VERSION = 1  # always: a group takes a server that says another than it was given for one that has started anew


def measure(options: argparse.Namespace, folder: Path, url: str) -> tuple[dict[str, list[float]], list[int]]:
    """Returns the seconds of each way by round, and the bytes of each bucket."""
    policy = build(folder / "model")
    buckets = Buckets(policy, options.bucket_mb << 20)
    sizes = [sum(tensor.nbytes for _, tensor in bucket) for bucket in buckets]
    loop, bare, loading = LoopThread(), Pair(sizes, folder / "bare"), Pair(sizes, folder / "loading", load=True)
    syncs = {name: sync(name, options.bucket_mb, policy, folder, loop) for name in options.transfers}
    works: dict[str, Callable[[], float]] = {"broadcast": bare.seconds, "with copies": loading.seconds}
    server = SglangServer(url)
    for name, pushes in syncs.items():
        works[name] = Pushes(pushes, policy, server)
    try:
        for work in works.values():
            work()
        seconds = in_turns(works, options.rounds)
    finally:
        bare.close()
        loading.close()
        for pushes in syncs.values():
            pushes.close()
        loop.call(server.close())
    return seconds, sizes


def build(model: Path) -> Policy:
    """Load the folder's model as a policy, in a job of this process alone."""
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
