"""What ranks run to give servers weights; module-level, so that it can be sent to them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import on_ranks
import torch

from flowrl_mega.config import SyncSettings
from flowrl_mega.model.weights import named_tensors
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.sync import WeightSync

KEPT: dict[str, tuple[WeightSync, LoopThread | None]] = {}  # a group of servers lives from one push to the next


def push(
    path: Path, urls: list[str], version: int, folder: Path, amount: float = 0.0, tp: int = 1, check: bool = False,
    keep: bool = False, pp: int = 1, by_rank: bool = False, **settings: Any,
) -> tuple[dict[str, str], dict[str, torch.Tensor], dict[str, float]]:  # fmt: skip
    """The model, every parameter changed by its own factor, to the servers. What failed; what the policy is.

    `by_rank`: each rank gives them to its own server, as if it were its node's first one."""
    policy = on_ranks.build(path, log_z="mlp", parallel={"tp": tp, "pp": pp})
    with torch.no_grad():
        for name, parameter in policy.gpt_parameters().items():
            parameter.mul_(1 + amount * (1 + len(name) % 5))
    rank = policy.layout.rank
    key = json.dumps([tp, pp, by_rank, settings])
    if key not in KEPT:
        side_files = {"config.json": (path / "config.json").read_bytes()}
        loop = LoopThread() if rank == 0 or by_rank else None
        options = SyncSettings(bucket_mb=1, **settings)
        KEPT[key] = WeightSync(options, False, policy.layout, policy.arch, side_files, folder, loop), loop
    sync, loop = KEPT[key]
    servers = [SglangServer(url) for url in (urls[rank : rank + 1] if by_rank else urls)] if loop else []
    failures = sync.push(policy, servers, version, check)
    for server in servers:
        loop.call(server.close())
    if not keep:
        KEPT.pop(key)
        sync.close()
        if loop:
            loop.close()
    return failures, {name: tensor.clone() for name, tensor in named_tensors(policy)}, sync.metrics
