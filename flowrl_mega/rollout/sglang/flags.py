"""Command lines of SGLang servers, the GPUs that each one gets, and what is wrong with either before a start."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from flowrl_mega.config import ConfigError, RolloutSettings

TESTED_WITH = "0.5.23"
CPU_LAUNCHER = Path(__file__).parent / "cpu_server" / "launch.py"
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
# Flags that Fleet sets for each server, and those of a server that spans several hosts.
RESERVED = ("host", "port", "model", "model-path", "nnodes", "node-rank", "base-gpu-id", "gpu-id-step")


def command(
    settings: RolloutSettings,
    model: Path,
    dtype: str,
    port: int,
    load_format: str,
    host: str = "127.0.0.1",
    first_gpu: int | None = None,
) -> list[str]:
    """The server's command line. `rollout.server_args` come last and win; check_servers refuses those in RESERVED.

    `first_gpu`: the first of its GPUs, by number among those that this process sees. The server sees all of them: a
    handle of memory on the trainer's GPU opens only where that GPU can be seen.
    """
    flags: dict[str, Any] = {
        "model-path": str(Path(model).resolve()),
        "host": host,
        "port": port,
        "dtype": DTYPES[dtype],
        "load-format": load_format,
        "log-level-http": "warning",  # otherwise a line per request
    }
    on_cpu = not on_gpu(settings)
    if on_cpu:
        # Otherwise an idle scheduler spins on a core that the trainer needs.
        flags |= {"device": "cpu", "attention-backend": "torch_native", "sleep-on-idle": True}
    else:
        flags |= {"base-gpu-id": first_gpu} | ({"enable-memory-saver": True} if settings.colocated else {})
    flags |= _named(settings.server_args)
    program = [str(CPU_LAUNCHER)] if on_cpu else ["-m", "sglang.launch_server"]
    return [settings.python or sys.executable, *program, *_written(flags)]


def _named(server_args: dict[str, Any]) -> dict[str, Any]:
    """The flags under their names on the command line, so that enable_x and enable-x are the same."""
    return {name.lstrip("-").replace("_", "-"): value for name, value in server_args.items()}


def _written(flags: dict[str, Any]) -> list[str]:
    """Flags as words: True gives the flag alone, False and None nothing, a list several values, a mapping JSON."""
    words: list[str] = []
    for name, value in flags.items():
        if value is None or value is False:
            continue
        words.append(f"--{name}")
        if value is not True:
            values = value if isinstance(value, list) else [value]
            words += [json.dumps(part) if isinstance(part, dict) else str(part) for part in values]
    return words


def on_gpu(settings: RolloutSettings) -> bool:
    """Whether the servers started here run on GPUs."""
    return settings.server_args.get("device", "cuda") == "cuda" and torch.cuda.is_available()


def ranks_per_server(settings: RolloutSettings) -> int:
    """The number of ranks of one server; each has a GPU of its own."""
    flags = _named(settings.server_args)
    size = 1
    for names in (("tp-size", "tp", "tensor-parallel-size"), ("pp-size", "pp", "pipeline-parallel-size")):
        size *= next((int(flags[name]) for name in names if name in flags), 1)
    if not flags.get("enable-dp-attention"):  # with it, the data-parallel ranks are the tensor-parallel ones
        size *= next((int(flags[name]) for name in ("dp-size", "dp", "data-parallel-size") if name in flags), 1)
    return size


def placement(settings: RolloutSettings, trainer_gpus: int) -> list[int]:
    """Each server's first GPU, of ranks_per_server next to each other; [] on CPU. ConfigError if this host has too
    few, or two processes of one communicator would be on the same."""
    assert isinstance(settings.servers, int)
    if not on_gpu(settings):
        return []
    if settings.colocated and settings.sync.transfer == "distributed":
        raise ConfigError(
            "rollout.sync.transfer = 'distributed': NCCL refuses two processes on one GPU, as rollout.colocated=true "
            "puts them; leave it out, or take tensor or disk"
        )
    count = torch.cuda.device_count()
    size, first = ranks_per_server(settings), 0 if settings.colocated else trainer_gpus
    needed = first + settings.servers * size
    if needed > count:
        others = "" if settings.colocated else f" beside the trainer's {trainer_gpus}"
        raise ConfigError(
            f"rollout.servers = {settings.servers}: {settings.servers * size} GPUs ({size} a server){others}, but this "
            f"host has {count}; take fewer servers, a smaller rollout.server_args.tp_size, or rollout.colocated=true"
        )
    return list(range(first, needed, size))


def check_servers(settings: RolloutSettings, trainer_gpus: int = 0) -> str:
    """A description of the servers that would be started; ConfigError if they cannot be."""
    assert isinstance(settings.servers, int)
    for given, name in zip(settings.server_args, _named(settings.server_args), strict=True):
        if name in RESERVED:
            raise ConfigError(
                f"rollout.server_args.{given} = {settings.server_args[given]!r}: set for each server that we start; "
                "leave it out, or start the servers yourself and give their URLs as rollout.servers"
            )
    placement(settings, trainer_gpus)
    version = sglang_version(settings.python or sys.executable)
    if on_gpu(settings) and settings.sync.way(settings.colocated) == "distributed":
        check_nccl(settings.python or sys.executable)
    tested = "" if version == TESTED_WITH else f" (tested with {TESTED_WITH})"
    where = f"{ranks_per_server(settings)} GPUs each" if on_gpu(settings) else "on CPU"
    many = "1 server" if settings.servers == 1 else f"{settings.servers} servers"
    return f"{many} of SGLang {version}{tested}, {where}"


def check_nccl(python: str) -> None:
    """Refuse servers whose NCCL is not the trainer's: both are to be in one communicator, which takes one version."""
    ours, theirs = nccl_version(sys.executable), nccl_version(python)
    if ours and theirs and ours != theirs:
        raise ConfigError(
            f"rollout.python = {python!r}: its NCCL is {theirs} and the trainer's {ours}, and weights can be broadcast "
            "between equal ones only; `make setup-sglang` gives .venv the servers' (nvidia-nccl-cu13=="
            f"{theirs}), or set rollout.sync.transfer=disk"
        )


def nccl_version(python: str) -> str | None:
    """Of the wheel that an interpreter's torch brings along; None where NCCL comes from elsewhere."""
    show = "import importlib.metadata as m; print(*[d.version for d in m.distributions(name='nvidia-nccl-cu13')])"
    result = subprocess.run([python, "-c", show], capture_output=True, text=True, timeout=120)
    return next(iter(result.stdout.split()), None)


def sglang_version(python: str) -> str:
    """The version of SGLang that an interpreter has, from its metadata: importing sglang takes 10 s and more."""
    show = "import importlib.metadata as m; print(m.version('sglang'))"
    fix = "`make setup-sglang` prints the path of one that has it"
    try:
        result = subprocess.run([python, "-c", show], capture_output=True, text=True, timeout=120)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise ConfigError(f"rollout.python = {python!r}: cannot be run ({error}); {fix}") from None
    if result.returncode:
        raise ConfigError(f"rollout.python = {python!r}: this interpreter has no sglang; {fix}")
    return result.stdout.strip()
