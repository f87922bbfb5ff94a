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
from flowrl_mega.parallel.layout import Layout


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
        parameters = {name: p.detach() for name, p in self.policy.gpt.named_parameters()}
        self.tensors = dict(_gather(parameters, self.policy.layout, to_all=True))
        return self.tensors


def named_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of the policy, on every rank; never the partition function."""
    for name, whole in WholeWeights(policy).gather().items():
        yield from zip(hf_names(name, policy.arch), to_named(name, whole, policy.arch), strict=True)


@torch.no_grad()
def named_buckets(
    policy: Policy, bucket_bytes: int, dtype: torch.dtype | None = None
) -> Iterator[list[tuple[str, Tensor]]]:
    """The policy under Hugging Face's names, some tensors at a time, on tensor-parallel rank 0. Collective there.

    The other ranks get empty lists and must take all of them. A bucket holds at most `bucket_bytes` as `dtype` (None:
    the parameters' own), or one larger parameter; what one parameter holds (q, k and v; gate and up) is never parted.
    Two buckets' worth of memory; at tp = 1 and the same type none: the tensors are the parameters.
    """
    arch, layout = policy.arch, policy.layout
    for parameters in _buckets(policy, bucket_bytes, dtype):
        wholes = _gather({name: p.detach().to(dtype or p.dtype) for name, p in parameters.items()}, layout)
        yield [
            pair
            for name, whole in wholes
            for pair in zip(hf_names(name, arch), to_named(name, whole, arch), strict=True)
        ]


def bucket_count(policy: Policy, bucket_bytes: int, dtype: torch.dtype | None = None) -> int:
    """How many lists `named_buckets` gives for these arguments."""
    return sum(1 for _ in _buckets(policy, bucket_bytes, dtype))


def _buckets(policy: Policy, bucket_bytes: int, dtype: torch.dtype | None) -> Iterator[dict[str, Tensor]]:
    """The policy's parameters in runs of one type and of `bucket_bytes` over all ranks."""
    bucket: dict[str, Tensor] = {}
    held, kind = 0, None
    for name, parameter in policy.gpt.named_parameters():
        sent = dtype or parameter.dtype
        size = parameter.numel() * sent.itemsize * policy.layout.tp
        if bucket and (held + size > bucket_bytes or parameter.dtype != kind):
            yield bucket
            bucket, held = {}, 0
        bucket[name], kind = parameter, parameter.dtype
        held += size
    yield bucket


def _gather(shards: dict[str, Tensor], layout: Layout, to_all: bool = False) -> Iterator[tuple[str, Tensor]]:
    """Whole tensors of these shards of one type, in one flat collective; `to_all`: not on the first rank only."""
    if layout.tp == 1:
        yield from shards.items()
        return
    flat = torch.cat([shard.reshape(-1) for shard in shards.values()])
    wanted = to_all or layout.tp_rank == 0
    everyone = [torch.empty_like(flat) for _ in range(layout.tp)] if wanted else None
    if to_all:
        dist.all_gather(everyone, flat, group=layout.tp_group)
    else:
        dist.gather(flat, everyone, group=layout.tp_group, group_dst=0)
    del flat
    sizes = [shard.numel() for shard in shards.values()]
    pieces = zip(*(rank.split(sizes) for rank in everyone or ()), strict=True)
    for (name, shard), parts in zip(shards.items(), pieces, strict=wanted):
        yield name, from_shards(name, [part.view(shard.shape) for part in parts])
