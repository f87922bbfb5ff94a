"""Training with `ops.backend = liger`: Liger-Kernel where it is installed, else a stand-in for it."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from on_ranks import step_by_updates
from torch import Tensor


class StandIn:
    """Liger's function of one rank: per-token negative log-probs and entropy."""

    @staticmethod
    def apply(
        hidden: Tensor, weight: Tensor, target: Tensor, temperature: float, ignored: int, *rest: Any
    ) -> tuple[Tensor, Tensor]:
        logps = torch.log_softmax(hidden @ weight.t() / temperature, -1)
        read = target != ignored
        nll = torch.where(read, -logps.gather(1, target.clamp(0)[:, None])[:, 0], 0.0)
        return nll, torch.where(read, -(logps.exp() * logps).sum(-1), 0.0)


def stand_in() -> dict[str, ModuleType]:
    """The modules of Liger-Kernel that we import, by name."""
    ops: Any = ModuleType("liger_kernel.ops")
    ops.LigerFusedLinearScaledCrossEntropyFunction = StandIn
    ops.LigerFusedLinearScaledCrossEntropyTPFunction = None
    return {"liger_kernel": ModuleType("liger_kernel"), "liger_kernel.ops": ops}


def step_with_liger(path: Path, **sections: Any) -> list[dict[str, float]]:
    """As `step_by_updates`."""
    modules = {} if importlib.util.find_spec("liger_kernel") else stand_in()
    sys.modules.update(modules)
    try:
        return step_by_updates(path, ops={"backend": "liger"}, **sections)
    finally:
        for name in modules:
            del sys.modules[name]
