"""What the machine itself must have for a run, found before a rank starts: GPUs that torch can use, room on the disk
for a checkpoint, and shared memory for weights on their way to servers."""

from __future__ import annotations

import math
import os
import shutil
import socket
from pathlib import Path

import torch

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.names import hf_shapes
from flowrl_mega.parallel.layout import is_first_on_host, raise_on_all_ranks

SHARED_MEMORY = Path("/dev/shm")
BUFFERS = 2  # that take turns, see rollout/sglang/transfers.py


def check_gpus(device: Path = Path("/dev/nvidia0")) -> str | None:
    """Refuse to train on the CPUs of a SLURM job that has GPUs; elsewhere say what GPUs are left alone, if any are."""
    if torch.cuda.is_available() or os.environ.get("CUDA_VISIBLE_DEVICES") == "":
        return None
    why = f"torch {torch.__version__} cannot use them; nvidia-smi tells what the driver says"
    if torch.version.cuda is None:
        why = f"torch {torch.__version__} is a CPU build: make setup TORCH=cuda"
    count = os.environ.get("SLURM_GPUS_ON_NODE", "")
    if count.isdigit() and int(count):
        raise ConfigError(
            f"SLURM_GPUS_ON_NODE = {count}: the job has GPUs, but {why}. To train on CPUs all the same set "
            "CUDA_VISIBLE_DEVICES= (to nothing)"
        )
    return f"this machine has GPUs, but {why}; training on the CPU" if device.exists() else None


def check_allocator(config: Config) -> None:
    """Refuse expandable segments where weights go by CUDA IPC or servers give their memory back: torch hands such
    memory to another process by pidfd_getfd only, which containers forbid, and torch_memory_saver raises in servers."""
    rollout = config.rollout
    for name in ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF"):
        value = os.environ.get(name, "")
        if "expandable_segments:true" not in value.lower() or not torch.cuda.is_available():
            continue
        if rollout.engine == "sglang" and (rollout.colocated or rollout.sync.way(rollout.colocated) == "tensor"):
            raise ConfigError(
                f"{name} = {value!r}: servers on the trainer's GPUs (rollout.colocated, rollout.sync.transfer=tensor) "
                "can neither open such memory nor give theirs back; leave expandable_segments out"
            )


def check_hosts(config: Config, arch: Architecture) -> None:
    """Disk and shared memory of every host, looked at by its first rank; raised on all ranks. Collective."""
    with raise_on_all_ranks():
        if is_first_on_host():
            try:
                check_disk(config, arch)
                check_shared_memory(config)
            except ConfigError as error:
                raise ConfigError(f"{socket.gethostname()}: {error}") from None


def check_disk(config: Config, arch: Architecture) -> None:
    """Refuse a run whose first checkpoint would fill the disk: weights, fp32 master weights beside those in bf16, and
    the two moments, of the policy alone."""
    parameters = sum(math.prod(shape) for shape in hf_shapes(arch).values())
    needed = parameters * (2 + 4 + 8 if config.model.dtype == "bf16" else 4 + 8)
    place = Path(config.run_dir).absolute()
    while not place.exists():
        place = place.parent
    free = shutil.disk_usage(place).free
    if free < needed:
        raise ConfigError(
            f"run_dir = {config.run_dir!r}: a checkpoint of this model takes {needed / 1e9:.2f} GB, and {place} has "
            f"{free / 1e9:.2f} GB left; free some, or choose a run_dir on another disk"
        )


def check_shared_memory(config: Config) -> None:
    """Refuse weights by shared memory where there is too little: a write beyond it ends the trainer with SIGBUS. CUDA
    IPC needs none."""
    rollout = config.rollout
    if (
        rollout.engine != "sglang"
        or rollout.sync.way(rollout.colocated) != "tensor"
        or torch.cuda.is_available()
        or not SHARED_MEMORY.exists()
    ):
        return
    needed = BUFFERS * rollout.sync.bucket_mb << 20
    free = shutil.disk_usage(SHARED_MEMORY).free
    if free < needed:
        raise ConfigError(
            f"rollout.sync.bucket_mb = {rollout.sync.bucket_mb}: {BUFFERS} buckets take {needed >> 20} MB of shared "
            f"memory, and {SHARED_MEMORY} has {free >> 20} MB left (Docker gives 64: docker run --shm-size=8g); take "
            "less, or rollout.sync.transfer=disk"
        )
