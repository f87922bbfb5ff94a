"""What ranks do for test_convert: training's own policy, saved and loaded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from conversion_models import tensors
from megatron.core import dist_checkpointing
from on_ranks import build, start
from torch import Tensor

from flowrl_mega.checkpoint import load_model
from flowrl_mega.model.weights import named_tensors


def save(hf: Path, run_dir: Path, z: str, **sections: Any) -> dict[str, Tensor]:
    """The trainer's checkpoint of the policy in `hf` before any update; gives the partition function in it, made up."""
    job = start(hf, run_dir=str(run_dir), objective={"name": "flowrl", "z": z}, **sections)
    partition = job.models.policy.partition
    assert partition is not None
    generator = torch.Generator().manual_seed(0)
    for parameter in partition.parameters():
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    job.trainer.step_done = 1
    job.save()
    return {name: tensor.clone() for name, tensor in partition.state_dict().items()}


@torch.no_grad()
def different_shards(hf: Path, megatron: Path, **sections: Any) -> list[str]:
    """Parameters that training's two ways of loading, and Megatron's own, do not agree on; and names exported wrong."""
    policy = build(hf, **sections)
    wanted = {name: parameter.clone() for name, parameter in policy.gpt_parameters().items()}
    named = {name: tensor.clone() for name, tensor in named_tensors(policy)}
    different = [] if _equal(named, tensors(hf)) else ["named_tensors"]
    for load in (_load_stock, load_model):
        for parameter in policy.gpt_parameters().values():
            parameter.zero_()  # padded rows of the vocabulary stay so
        load(policy, megatron)
        found = policy.gpt_parameters()
        different += [f"{load.__name__}: {name}" for name in wanted if not torch.equal(found[name], wanted[name])]
    return different


def _load_stock(policy: Any, megatron: Path) -> None:
    state = {"model": policy.stages[0].gpt.sharded_state_dict()}
    policy.stages[0].gpt.load_state_dict(dist_checkpointing.load(state, str(megatron))["model"])


def _equal(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())
