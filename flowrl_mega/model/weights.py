"""The policy's weights: filled from a Hugging Face folder, gathered from all shards, under Hugging Face's names."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from megatron.core.fp8_utils import dequantize_fp8_tensor, is_float8tensor
from torch import Tensor

from flowrl_mega.model.hf_folder import HfFolder
from flowrl_mega.model.names import from_shards, hf_names, to_named, to_shard, to_whole
from flowrl_mega.model.stage import Model
from flowrl_mega.parallel.layout import Layout

EMBEDDING = "embedding.word_embeddings.weight"


def fill(parameter: Tensor, values: Tensor) -> None:
    """Copy `values` into the parameter of the same shape and, where that is kept in FP8, also into the exact initial
    value that Transformer Engine keeps beside it, from which the optimizer makes its fp32 weight."""
    parameter.copy_(values)
    exact = getattr(parameter, "_high_precision_init_val", None)  # Transformer Engine's name
    if exact is not None:
        exact.copy_(values)


def _plain(parameter: Tensor) -> Tensor:
    """The weight as a plain tensor of its shape; a weight kept in FP8 is dequantized."""
    parameter = parameter.detach()
    return dequantize_fp8_tensor(parameter) if is_float8tensor(parameter) else parameter


@torch.no_grad()
def load_hf(model: Model, path: str | Path) -> None:
    """Fill the model's shards from the safetensors of a Hugging Face folder, tensor by tensor."""
    folder, arch, layout = HfFolder(path), model.arch, model.layout
    folder.check(arch)
    for name, parameter in model.gpt_parameters().items():
        whole = to_whole(name, [folder.read(part) for part in hf_names(name, arch)], arch)
        fill(parameter, to_shard(name, whole, layout.tp, layout.tp_rank))
    if (head := model.tied_head()) is not None:
        head.copy_(to_shard(EMBEDDING, folder.read(*hf_names(EMBEDDING, arch)), layout.tp, layout.tp_rank))


class ParamInfo(NamedTuple):
    """A parameter of the whole model, as each rank of the pipeline stage that has it holds it."""

    name: str  # GPTModel's, layers counted over the whole model
    stage: int
    shape: torch.Size  # of one tensor-parallel rank's shard
    dtype: torch.dtype


def param_infos(policy: Model) -> list[ParamInfo]:
    """All parameters of the model, stage by stage; the same list on every rank. Collective."""
    layout = policy.layout
    mine = [ParamInfo(name, layout.pp_rank, p.shape, p.dtype) for name, p in policy.gpt_parameters().items()]
    if layout.pp == 1:
        return mine
    stages: list[list[ParamInfo]] = [[] for _ in range(layout.pp)]
    dist.all_gather_object(stages, mine, group=layout.pp_group)
    return [info for stage in stages for info in stage]


class WholeWeights:
    """The policy's weights as `whole` tensors on every rank, in buffers that are filled again at each `gather`.

    Where one rank has all they are the parameters themselves. Else a stage's shards travel in one flat all-gather, and
    from there to the other stages.
    """

    def __init__(self, policy: Model) -> None:
        self.policy, self.infos = policy, param_infos(policy)
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        for stage in range(self.policy.layout.pp):
            of_stage = [info for info in self.infos if info.stage == stage]
            self.tensors.update(_gather(self.policy, of_stage, None, to_all=True))
        return self.tensors


def named_tensors(policy: Model) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of the policy, on every rank; never the partition function."""
    for name, whole in WholeWeights(policy).gather().items():
        yield from zip(hf_names(name, policy.arch), to_named(name, whole, policy.arch), strict=True)


class Buckets:
    """The policy under Hugging Face's names, some tensors at a time, on the replica's first rank, or `to_all`.

    A bucket holds at most `bucket_bytes` as `dtype` (None: the parameters' own), or one larger parameter; what one
    parameter holds (q, k and v; gate and up) is never parted, nor do stages share one. Two buckets' worth of memory;
    where one rank has all and the type stays, none: the tensors are the parameters. Collective, as is each iteration:
    ranks of the replica that get nothing get empty lists, and must take all of them.
    """

    def __init__(
        self, policy: Model, bucket_bytes: int, dtype: torch.dtype | None = None, to_all: bool = False
    ) -> None:
        self.policy, self.dtype, self.to_all = policy, dtype, to_all
        self.buckets = list(_cut(param_infos(policy), bucket_bytes, dtype, policy.layout.tp))

    def __len__(self) -> int:
        return len(self.buckets)

    def __iter__(self) -> Iterator[list[tuple[str, Tensor]]]:
        arch = self.policy.arch
        for bucket in self.buckets:
            yield [
                pair
                for name, whole in _gather(self.policy, bucket, self.dtype, self.to_all)
                for pair in zip(hf_names(name, arch), to_named(name, whole, arch), strict=True)
            ]


def _cut(
    found: Iterable[ParamInfo], bucket_bytes: int, dtype: torch.dtype | None, tp: int
) -> Iterator[list[ParamInfo]]:
    """Runs of one stage and one type, of `bucket_bytes` over all ranks."""
    bucket: list[ParamInfo] = []
    held = 0
    for info in found:
        size = info.shape.numel() * (dtype or info.dtype).itemsize * tp
        unlike = bucket and (bucket[-1].stage, bucket[-1].dtype) != (info.stage, info.dtype)
        if bucket and (held + size > bucket_bytes or unlike):
            yield bucket
            bucket, held = [], 0
        bucket.append(info)
        held += size
    yield bucket


@torch.no_grad()
def _gather(
    policy: Model, bucket: list[ParamInfo], dtype: torch.dtype | None, to_all: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Names and `whole` tensors of a bucket, whose parameters are of one stage and one type; on the replica's first
    rank, or `to_all`. Collective, and a generator: nothing is sent before a rank asks for the first item.

    1. The stage's ranks gather their shards, each as one flat tensor: on the first of them, or on all.
    2. They travel from this stage to the first one, or to all.
    3. Each parameter is cut out of the flat tensors and joined.
    """
    layout, stage = policy.layout, bucket[0].stage
    dtype = dtype or bucket[0].dtype
    parameters = policy.gpt_parameters() if layout.pp_rank == stage else {}
    if layout.tp == layout.pp == 1:
        yield from ((info.name, _plain(parameters[info.name]).to(dtype)) for info in bucket)
        return
    sizes = [info.shape.numel() for info in bucket]
    flat_shards: list[Tensor] | None = None  # by tensor-parallel rank; None where this rank gets none
    if to_all or (layout.tp_rank == 0 and layout.pp_rank in (0, stage)):
        flat_shards = [torch.empty(sum(sizes), dtype=dtype, device=layout.device) for _ in range(layout.tp)]
    if layout.pp_rank == stage:
        own = torch.cat([_plain(parameters[info.name]).reshape(-1).to(dtype) for info in bucket])
        _gather_shards(own, flat_shards, layout, to_all)
        del own  # the caller keeps this generator while it works with what it yields
    if flat_shards is None:
        return
    if layout.pp > 1:
        _send_between_stages(flat_shards, layout, stage, to_all)
    if to_all or layout.pp_rank == 0:
        by_parameter = zip(*(flat.split(sizes) for flat in flat_shards), strict=True)
        for info, parts in zip(bucket, by_parameter, strict=True):
            yield info.name, from_shards(info.name, [part.view(info.shape) for part in parts])


def _gather_shards(own: Tensor, flat_shards: list[Tensor] | None, layout: Layout, to_all: bool) -> None:
    """Step 1, by the tensor-parallel ranks of one stage: every rank's `own` into `flat_shards`."""
    if to_all:
        dist.all_gather(flat_shards, own, group=layout.tp_group)
    else:
        dist.gather(own, flat_shards, group=layout.tp_group, group_dst=0)


def _send_between_stages(flat_shards: list[Tensor], layout: Layout, stage: int, to_all: bool) -> None:
    """Step 2, by ranks of equal tensor-parallel rank: from `stage` to every other one, or to the first one."""
    for flat in flat_shards:
        if to_all:
            dist.broadcast(flat, group=layout.pp_group, group_src=stage)
        elif stage != 0 and layout.pp_rank == stage:
            dist.send(flat, group=layout.pp_group, group_dst=0)
        elif stage != 0:
            dist.recv(flat, group=layout.pp_group, group_src=stage)
