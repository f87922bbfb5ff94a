"""What a checkpoint holds: policy, partition function, optimizer, schedule, random states and the trainer's counts."""

from __future__ import annotations

import logging
import os
import random
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import ShardedObject

from flowrl_mega.checkpoint.folder import remove_old
from flowrl_mega.config import ConfigError
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.optimizer import Optimizer


# Its successor needs another package (nvidia-resiliency-ext) and says so at each save.
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)


def save_checkpoint(
    run_dir: Path, policy: Policy, optimizer: Optimizer, trainer: dict[str, Any], keep_last: int
) -> Path:
    """Write checkpoints/step_N (N = trainer["step"]) under a temporary name, rename it, drop the oldest. Collective."""
    layout = policy.layout
    final = run_dir / "checkpoints" / f"step_{trainer['step']}"
    partial = final.with_name(f".{final.name}")
    if layout.rank == 0:
        partial.mkdir(parents=True, exist_ok=True)
    dist.barrier()
    state = _state(policy, optimizer, is_loading=False)
    state["trainer"] = {**trainer, "updates": optimizer.updates, "skipped": optimizer.skipped, "world": layout.world}
    state["random"] = _sharded_random(layout)
    dist_checkpointing.save(state, str(partial), async_strategy="mcore", verify_integrity=True)
    if layout.rank == 0:
        _flush(partial)
        os.rename(partial, final)
        remove_old(run_dir, keep_last)
    dist.barrier()
    return final


def load_checkpoint(path: Path, policy: Policy, optimizer: Optimizer) -> dict[str, Any]:
    """Fill policy and optimizer; returns the `trainer` counts. Works at another tensor-parallel size. Collective.

    Random states are restored where the number of ranks is the same; nothing in a step draws from them unless a
    reward function does.
    """
    try:
        common = dist_checkpointing.load_common_state_dict(str(path))
        state = _state(policy, optimizer, is_loading=True)
        if same_world := common["trainer"]["world"] == policy.layout.world:
            state["random"] = _sharded_random(policy.layout)
        state = dist_checkpointing.load(state, str(path))
    except (CheckpointingException, KeyError, RuntimeError) as error:
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(f"{path}: does not fit this model or these settings ({first_line})") from None
    policy.load_state_dict(state["model"])
    optimizer.inner.load_state_dict(state["optimizer"])
    optimizer.schedule.num_steps = 0
    optimizer.schedule.step(increment=state["schedule_steps"])
    optimizer.updates, optimizer.skipped = state["trainer"]["updates"], state["trainer"]["skipped"]
    if same_world:
        _set_random(state["random"])
    return state["trainer"]


def _state(policy: Policy, optimizer: Optimizer, is_loading: bool) -> dict[str, Any]:
    model = policy.sharded_state_dict()
    # The schedule's settings are the configuration's, so that a resumed run can change them; only its count is state.
    return {
        "model": model,
        "optimizer": optimizer.inner.sharded_state_dict(model, is_loading=is_loading),
        "schedule_steps": optimizer.schedule.num_steps,
    }


def _sharded_random(layout: Layout) -> ShardedObject:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
    }
    return ShardedObject("random", [states], (layout.world,), (layout.rank,))


def _set_random(states: list[dict[str, Any]]) -> None:
    random.setstate(states[0]["python"])
    np.random.set_state(states[0]["numpy"])
    torch.set_rng_state(states[0]["torch"])
    torch.cuda.set_rng_state(states[0]["cuda"])


def _flush(folder: Path) -> None:
    """Bytes on disk before the name says that they are."""
    for path in (*folder.iterdir(), folder):
        descriptor = os.open(path, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
