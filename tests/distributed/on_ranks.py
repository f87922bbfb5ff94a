"""What the ranks of a pool run; module-level functions, so that they can be sent."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

import flowrl_mega.parallel  # noqa: F401
from flowrl_mega.config import Config, validated
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.weights import load_hf
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.packing import Sequence, pack


def config_for(path: Path | str, **sections: Any) -> Config:
    """Settings with the model at `path`; sections as keyword arguments."""
    tree = {
        "run_dir": "unused",
        "steps": 1,
        "model": {"path": str(path)},
        "data": {"task": "sums"},
        "reward": "flowrl_mega.rewards.sums:score",
        **sections,
    }
    return validated(Config, tree, "")


def build(path: Path | str, log_z: Any = None, **sections: Any) -> Policy:
    """The policy of the Hugging Face folder in the layout that `parallel` says."""
    config = config_for(path, **sections)
    layout = layouts.init(config.parallel, config.seed)
    policy = Policy(read_architecture(path), config, layout, log_z)
    load_hf(policy, path)
    return policy


def packed(policy: Policy, sequences: list[Sequence]) -> Any:
    multiple = policy.layout.tp if policy.layout.sequence_parallel else 1
    return pack(sequences, multiple, policy.layout.device)


def score(path: Path, sequences: list[Sequence], temperature: float = 1.0, **sections: Any) -> dict[str, torch.Tensor]:
    """Log-probs and entropies, each with the index of its sequence."""
    policy = build(path, **sections)
    batch = packed(policy, sequences)
    output = policy.score(batch, temperature)
    segment = batch.index.repeat_interleave(batch.response_cu_seqlens.diff())
    return {"logp": output.logp, "entropy": output.entropy, "segment": segment}
