"""Which rank does what: process groups of the tensor- and data-parallel layout, and the rank's device."""

from __future__ import annotations

import contextlib
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
    dp: int
    dp_rank: int
    tp_group: dist.ProcessGroup
    dp_group: dist.ProcessGroup
    groups: ProcessGroupCollection
    device: torch.device
    sequence_parallel: bool

    def from_first(self, item: Any) -> Any:
        """Rank 0's `item`, on every rank."""
        items = [item]
        dist.broadcast_object_list(items, src=0)
        return items[0]

    def gather_objects(self, item: Any) -> list[Any]:
        """Every rank's `item`, by rank."""
        items: list[Any] = [None] * self.world
        dist.all_gather_object(items, item)
        return items


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
def together() -> Iterator[None]:
    """A ConfigError or RunError that one rank raises inside is raised by all: none is left waiting. Collective."""
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


def world_size(settings: ParallelSettings) -> int:
    """The ranks that the settings ask for when nobody has started any."""
    return settings.tp * (settings.dp or 1)


def check_world(settings: ParallelSettings, world: int) -> None:
    """Refuse a number of ranks that the layout does not divide."""
    if world % settings.tp:
        raise ConfigError(f"parallel.tp = {settings.tp}: does not divide the {world} ranks started; take a divisor")
    if settings.dp is not None and settings.tp * settings.dp != world:
        raise ConfigError(
            f"parallel.tp x parallel.dp = {settings.tp} x {settings.dp}: {world} ranks were started; "
            f"start {settings.tp * settings.dp}, or leave parallel.dp out"
        )
    if settings.sequence_parallel and settings.tp == 1:
        raise ConfigError("parallel.sequence_parallel = True: needs parallel.tp of at least 2")


def init(settings: ParallelSettings, seed: int) -> Layout:
    """Join the job described by RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT (as torchrun sets them)."""
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        place = local_rank % torch.cuda.device_count()  # srun may show each rank its own GPU only
        torch.cuda.set_device(place)
        device, backend = torch.device("cuda", place), "cpu:gloo,cuda:nccl"
    else:
        device, backend = torch.device("cpu"), "gloo"
    if not dist.is_initialized():
        dist.init_process_group(backend, timeout=timedelta(seconds=settings.timeout_s))
    check_world(settings, dist.get_world_size())
    if not _in_place(settings.tp):
        _drop_groups()
        parallel_state.initialize_model_parallel(tensor_model_parallel_size=settings.tp)
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    return Layout(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tp=settings.tp,
        tp_rank=parallel_state.get_tensor_model_parallel_rank(),
        dp=parallel_state.get_data_parallel_world_size(),
        dp_rank=parallel_state.get_data_parallel_rank(),
        tp_group=parallel_state.get_tensor_model_parallel_group(),
        dp_group=parallel_state.get_data_parallel_group(),
        groups=ProcessGroupCollection.use_mpu_process_groups(),
        device=device,
        sequence_parallel=settings.sequence_parallel,
    )


def _in_place(tp: int) -> bool:
    """True where the groups of this layout exist already."""
    return (
        parallel_state.model_parallel_is_initialized() and parallel_state.get_tensor_model_parallel_world_size() == tp
    )


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
