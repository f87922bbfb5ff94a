"""Whole training jobs for tests, at the price of a fork.

Importing torch and megatron costs a process seconds, so the ranks are forked from a server that has imported them
already. Each is otherwise a rank like any: its own process in torchrun's environment, running the command line.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from pathlib import Path
from typing import Any

import yaml
from rank_pool import FORKSERVER

from flowrl_mega.monitor.metric_names import is_measured
from flowrl_mega.parallel.launch import free_port, rank_environment


def write_config(folder: Path, model: Path, **changes: Any) -> Path:
    """A YAML file for a short FlowRL run of two updates a step, in `folder`; `changes` replace whole sections."""
    tree = {
        "run_dir": str(folder / "run"),
        "steps": 6,
        "model": {"path": str(model)},
        "parallel": {"tp": 2, "timeout_s": 60},
        "data": {"task": "sums", "task_args": {"lo": 10, "hi": 30}, "held_out": 0.2},
        "reward": "flowrl_mega.rewards.sums:score",
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 8},
        "objective": {"name": "flowrl", "beta": 2.0},
        "optimizer": {"lr": 1e-3, "log_z_lr": 1e-2, "warmup_steps": 3},
        "batch": {"mini_batch": 8, "tokens_per_microbatch": 48},
        "checkpoint": {"every": 2},
        "evaluation": {"every": 2, "samples": 2},
        "monitor": {"progress": False},
        **changes,
    }
    path = folder / "config.yaml"
    path.write_text(yaml.safe_dump(tree))
    return path


class Job:
    """`world` ranks of `flowrl-mega ARGUMENTS`; `before` names a module:function that each runs first."""

    def __init__(
        self, arguments: list[str], log: Path, world: int = 2, before: str = "", cwd: Path | None = None
    ) -> None:
        port, self.log = free_port(), log
        self.ranks = [
            FORKSERVER.Process(
                target=_rank, args=(arguments, rank_environment(rank, world, port), log, before, cwd), daemon=True
            )
            for rank in range(world)
        ]
        for rank in self.ranks:
            rank.start()

    def wait(self, timeout: float = 240) -> list[int | None]:
        """The ranks' exit codes; those that do not end in time, or 20 s after a failed one, are killed (-9)."""
        end = time.monotonic() + timeout
        while any(rank.exitcode is None for rank in self.ranks) and time.monotonic() < end:
            if any(rank.exitcode for rank in self.ranks):
                end = min(end, time.monotonic() + 20)
            time.sleep(0.02)
        for rank in self.ranks:
            rank.kill()
            rank.join()
        return [rank.exitcode for rank in self.ranks]

    def run(self, timeout: float = 240) -> str:
        """Wait for success; returns what the ranks wrote."""
        codes = self.wait(timeout)
        assert codes == [0] * len(codes), f"exit codes {codes}\n{self.log.read_text()}"
        return self.log.read_text()


def _rank(arguments: list[str], environment: dict[str, str], log: Path, before: str, cwd: Path | None) -> None:
    import torch

    from flowrl_mega import cli

    os.environ.update(environment)
    with open(log, "a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    torch.set_num_threads(1)
    if cwd:
        os.chdir(cwd)
    if before:
        module, function = before.split(":")
        getattr(importlib.import_module(module), function)()
    sys.exit(cli.main(arguments))


def records(run_dir: Path, name: str) -> list[dict[str, Any]]:
    """One of the run folder's files without times, rates and memory: all that a run must reproduce to the bit."""
    rows = [json.loads(line) for line in (run_dir / f"{name}.jsonl").read_text().splitlines()]
    return [{key: value for key, value in row.items() if not is_measured(key)} for row in rows]
