"""Which rank does what: process groups of the layout (tensor, pipeline, context, data), and the rank's device."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from flowrl_mega.config import ConfigError, ParallelSettings, RunError


@dataclass(frozen=True)
class Layout:
    """The place of this process in the job."""

    rank: int
    world: int
    tp: int
    tp_rank: int
    pp: int
    pp_rank: int
    vpp: int  # virtual stages per pipeline rank
    cp: int
    cp_rank: int
    dp: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    cp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    replica_group: dist.ProcessGroup  # the tp x pp ranks that hold one whole model together
    groups: ProcessGroupCollection
    device: torch.device
    sequence_parallel: bool
    row_alignment: int = 1  # FP8 asks for 16: what each rank's rows of a micro-batch are a multiple of

    @property
    def is_last_stage(self) -> bool:
        """Whether this rank has the end of the model: the lm-head, the partition function and the losses."""
        return self.pp_rank == self.pp - 1

    @property
    def sequence_multiple(self) -> int:
        """What each packed sequence's number of rows must be divisible by: context parallelism deals out halves of
        its chunks."""
        return 1 if self.cp == 1 else 2 * self.cp * (self.tp if self.sequence_parallel else 1)

    @property
    def row_multiple(self) -> int:
        """What the number of packed rows must be divisible by."""
        shares = self.cp * (self.tp if self.sequence_parallel else 1)
        return math.lcm(shares * self.row_alignment, self.sequence_multiple)

    def from_last_stage(self, item: Any) -> Any:
        """Broadcast the last pipeline stage's `item` to the other stages; returns it on every stage."""
        if self.pp == 1:
            return item
        items = [item]
        dist.broadcast_object_list(items, group=self.pp_group, group_src=self.pp - 1, device=self.device)
        return items[0]

    def dp_sum(self, tensor: torch.Tensor) -> torch.Tensor:
        """All-reduce (sum) `tensor` over the data-parallel group, in place; returns it."""
        if self.dp > 1:
            dist.all_reduce(tensor, group=self.dp_group)
        return tensor

    def dp_sum_to_all_stages(self, tensor: torch.Tensor) -> torch.Tensor:
        """As `dp_sum` of the last pipeline stage's tensors, and broadcast to the other stages; in place."""
        self.dp_sum(tensor)
        if self.pp > 1:
            dist.broadcast(tensor, group=self.pp_group, group_src=self.pp - 1)
        return tensor

    def broadcast_from_rank0(self, item: Any) -> Any:
        """Broadcast rank 0's `item`; returns it on every rank."""
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def gather_objects(self, item: Any) -> list[Any]:
        """All-gather `item`; returns the list of every rank's, by rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items


def is_first_on_host() -> bool:
    """Whether no other of the job's processes on this host comes before this one."""
    return int(os.environ.get("LOCAL_RANK", "0")) == 0


def ranks_on_host() -> int:
    """How many of the job's processes this host has, by torchrun's name for it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def rank() -> int:
    """This process's place in the job; 0 where there is none."""
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    """How many processes the job has."""
    return dist.get_world_size() if dist.is_initialized() else 1


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Collective block: a ConfigError or RunError that one rank raises inside is raised on all ranks at its end."""
    fault: ConfigError | RunError | None = None
    try:
        yield
    except (ConfigError, RunError) as error:
        fault = error
    faults: list[Any] = [fault]
    if dist.is_initialized():
        faults = [None] * dist.get_world_size()
        dist.all_gather_object(faults, fault)
    for found in faults:
        if found:
            raise found


def world_size(settings: ParallelSettings, gpus: int | None, sequences: int) -> int:
    """The ranks to start where nobody has started any: parallel.dp replicas, or as many as the trainer's `gpus` hold
    (None: there are none) and the `sequences` of an update keep busy."""
    dp = settings.dp
    if dp is None:
        least = settings.pp if settings.vpp > 1 else 1  # sequences of a replica, see preflight.check_sequences
        dp = 1 if gpus is None else max(1, min(gpus // settings.model_ranks, sequences // least))
    ranks = settings.model_ranks * dp
    if gpus is not None and ranks > gpus:
        sizes = {name: getattr(settings, name) for name in ("tp", "pp", "cp")} | {"dp": dp}
        asked = " x ".join(f"parallel.{name} = {size}" for name, size in sizes.items() if size > 1)
        raise ConfigError(
            f"{asked}: {ranks} ranks, but this host has {gpus} GPUs for them, and two ranks cannot share one; take "
            "less, start the ranks on several hosts (torchrun, srun), or set CUDA_VISIBLE_DEVICES= to train on the CPU"
        )
    return ranks


def check_world(settings: ParallelSettings, world: int) -> None:
    """Refuse a number of ranks that the layout does not divide."""
    sizes = {name: getattr(settings, name) for name in ("tp", "pp", "cp")}
    used = {name: size for name, size in sizes.items() if size > 1} or {"tp": 1}
    names = " x ".join(f"parallel.{name}" for name in used)
    said = " x ".join(str(size) for size in used.values())
    if world % settings.model_ranks:
        fits = max(1, world // settings.model_ranks) * settings.model_ranks
        raise ConfigError(f"{names} = {said}: does not divide the {world} ranks started; start {fits}, or take less")
    if settings.dp is not None and settings.model_ranks * settings.dp != world:
        wanted = settings.model_ranks * settings.dp
        raise ConfigError(
            f"{names} x parallel.dp = {said} x {settings.dp}: {world} ranks were started; "
            f"start {wanted}, or leave parallel.dp out"
        )
    if settings.sequence_parallel and settings.tp == 1:
        raise ConfigError("parallel.sequence_parallel = True: needs parallel.tp of at least 2")
    if settings.vpp > 1 and settings.pp == 1:
        raise ConfigError(f"parallel.vpp = {settings.vpp}: needs parallel.pp of at least 2")


def init(settings: ParallelSettings, seed: int, row_alignment: int = 1) -> Layout:
    """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (as torchrun sets them).

    Without them, or with a WORLD_SIZE of 1, this process is a job of its own and opens no port.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        index = local_rank % torch.cuda.device_count()  # srun may show each rank its own GPU only
        torch.cuda.set_device(index)
        device, backend = torch.device("cuda", index), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        alone = {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        job: dict[str, Any] = alone if os.environ.get("WORLD_SIZE", "1") == "1" else {}
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout_s), **job)
    check_world(settings, dist.get_world_size())
    if not _in_place(settings):
        _drop_groups()
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=settings.tp,
            pipeline_model_parallel_size=settings.pp,
            virtual_pipeline_model_parallel_size=settings.vpp if settings.vpp > 1 else None,
            context_parallel_size=settings.cp,
            distributed_timeout_minutes=settings.timeout_s / 60,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=settings.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        pp=settings.pp,
        pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
        vpp=settings.vpp,
        cp=settings.cp,
        cp_rank=parallel_state.get_context_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        pp_group=parallel_state.get_pipeline_model_parallel_group(),
        cp_group=parallel_state.get_context_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        replica_group=parallel_state.get_model_parallel_group(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
        sequence_parallel=settings.sequence_parallel,
        row_alignment=row_alignment,
    )


def _in_place(settings: ParallelSettings) -> bool:
    """True where the groups of this layout exist already."""
    return parallel_state.model_parallel_is_initialized() and (
        parallel_state.get_tensor_model_parallel_world_size(),
        parallel_state.get_pipeline_model_parallel_world_size(),
        parallel_state.get_virtual_pipeline_model_parallel_world_size() or 1,
        parallel_state.get_context_parallel_world_size(),
    ) == (settings.tp, settings.pp, settings.vpp, settings.cp)


def _drop_groups() -> None:
    """End the groups of another layout. Megatron only forgets them, and each gloo group keeps threads of its own."""
    parallel_state.destroy_model_parallel()
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def shutdown() -> None:
    """Leave the job."""
    parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()
