"""The policy's weights: filled from a Hugging Face folder, gathered from all shards, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.model.hf_folder import HfFolder
from flowrl_mega.model.names import from_shards, hf_names, to_named, to_shard, to_whole
from flowrl_mega.model.policy import Policy


@torch.no_grad()
def load_hf(policy: Policy, path: str | Path) -> None:
    """Fill the policy's shards from the safetensors of a Hugging Face folder, tensor by tensor."""
    folder, arch, layout = HfFolder(path), policy.arch, policy.layout
    folder.check(arch)
    for name, parameter in policy.gpt.named_parameters():
        whole = to_whole(name, [folder.read(part) for part in hf_names(name, arch)], arch)
        parameter.copy_(to_shard(name, whole, layout.tp, layout.tp_rank))


class WholeWeights:
    """The policy's weights as `whole` tensors on every rank, in buffers that are filled again at each `gather`.

    At tp = 1 they are the parameters themselves. Else all shards travel in one flat all-gather.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        parameters = dict(self.policy.gpt.named_parameters())
        layout = self.policy.layout
        if layout.tp == 1:
            self.tensors = {name: p.detach() for name, p in parameters.items()}
            return self.tensors
        flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        everyone = [torch.empty_like(flat) for _ in range(layout.tp)]
        dist.all_gather(everyone, flat, group=layout.tp_group)
        sizes = [p.numel() for p in parameters.values()]
        pieces = zip(*(rank.split(sizes) for rank in everyone), strict=True)
        self.tensors = {
            name: from_shards(name, [piece.view(p.shape) for piece in shards])
            for (name, p), shards in zip(parameters.items(), pieces, strict=True)
        }
        return self.tensors


def named_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of the policy, on every rank; never the partition function."""
    for name, whole in WholeWeights(policy).gather().items():
        yield from zip(hf_names(name, policy.arch), to_named(name, whole, policy.arch), strict=True)
