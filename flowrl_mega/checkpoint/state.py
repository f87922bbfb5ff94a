"""What a checkpoint holds: policy, partition function, optimizer, schedule, random states and the trainer's counts."""

from __future__ import annotations

import dataclasses
import logging
import os
import queue
import random
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject, ShardedObject
from megatron.core.dist_checkpointing.serialization import load_sharded_metadata
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from torch.distributed.checkpoint.api import CheckpointException

from flowrl_mega.checkpoint.convert import megatron_to_hf
from flowrl_mega.checkpoint.folder import is_megatron, new_folder, remove_old, verify_checkpoint
from flowrl_mega.checkpoint.policy_tensors import MegatronTensors, write_side_files
from flowrl_mega.checkpoint.stream import AGAIN
from flowrl_mega.config import ConfigError, LogZ
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.hf_folder import HfFolder
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.stage import Model
from flowrl_mega.model.weights import fill, load_hf
from flowrl_mega.parallel.layout import Layout, raise_on_all_ranks
from flowrl_mega.parallel.optimizer import Optimizer

# Its successor needs another package (nvidia-resiliency-ext) and says so at each save.
logging.getLogger("megatron.core.dist_checkpointing").setLevel(logging.ERROR)

# What a load of a checkpoint that does not fit raises: Megatron's own, torch's own, and what these let through.
UNFIT = (CheckpointingException, CheckpointException, KeyError, RuntimeError)

# Megatron keeps a manager process on each rank (250 MB, and seconds at the first save) for a queue to the process that
# saves; we save in the rank itself, where a plain queue does.
filesystem_async._results_queue = queue.Queue()


# What a run trains, by name: each with its optimizer. "policy" is always there; another one's tensors carry its name.
TrainedModels = Mapping[str, tuple[Model, Optimizer]]


def save_checkpoint(
    run_dir: Path,
    trained: TrainedModels,
    trainer: dict[str, Any],
    keep_last: int,
    side: dict[str, bytes] | None = None,
    export_hf: bool = False,
) -> Path:
    """Write checkpoints/step_N (N = trainer["step"]) under a temporary name, rename it, drop the oldest. Collective.

    `side` are the files of the model's folder that go with its weights (`read_side_files`): with them the checkpoint
    can be converted, or trained from, on its own. `export_hf` adds the policy as a Hugging Face folder, step_N/hf.
    """
    policy, optimizer = _policy_of(trained)
    layout = policy.layout
    final = run_dir / "checkpoints" / f"step_{trainer['step']}"
    with new_folder(final) as partial:
        state = _state(trained, is_loading=False)
        counts = {"updates": optimizer.updates, "skipped": optimizer.skipped, "world": layout.world}
        state["trainer"] = {**trainer, **counts}
        state["made_for"] = _made_for(policy.arch, policy.log_z, _critic_of(trained))
        state["random"] = _sharded_random(layout)
        dist_checkpointing.save(state, str(partial), async_strategy="mcore", verify_integrity=True)
        if layout.rank == 0:
            write_side_files(side or {}, partial)
        dist.barrier()
        if export_hf:
            megatron_to_hf(partial, partial / "hf", show=False)
    if layout.rank == 0:
        remove_old(run_dir, keep_last)
    dist.barrier()
    return final


def check_checkpoint(path: Path, arch: Architecture, log_z: LogZ | None, critic: str | None) -> dict[str, Any]:
    """Refuse a broken checkpoint, or one of another model; returns its `trainer` state. Needs no ranks.

    `critic`: its trunk, or None.
    """
    verify_checkpoint(path)
    return _check_fits(path, arch, log_z, critic)["trainer"]


def load_checkpoint(path: Path, trained: TrainedModels) -> dict[str, Any]:
    """Fill the models and optimizers; returns the `trainer` counts. Works in another layout. Collective.

    Random states are restored where the number of ranks is the same; nothing in a step draws from them unless a
    reward function does.
    """
    policy, _ = _policy_of(trained)
    with raise_on_all_ranks():  # each rank reads a share of the files
        verify_checkpoint(path, policy.layout.rank, policy.layout.world)
    with ExitStack() as on_device:
        for _, optimizer in trained.values():
            on_device.enter_context(optimizer.on_device())
        return _load(path, trained)


def _load(path: Path, trained: TrainedModels) -> dict[str, Any]:
    policy, optimizer = _policy_of(trained)
    world = _check_fits(path, policy.arch, policy.log_z, _critic_of(trained))["trainer"]["world"]
    state = _state(trained, is_loading=True)
    if world == policy.layout.world:
        state["random"] = _sharded_random(policy.layout)
    _keep_extra_states(state, trained, path)
    try:
        with _quietly():
            state = dist_checkpointing.load(state, str(path))
    except UNFIT as error:
        raise ConfigError(f"{path}: does not fit these settings ({_reason(error)})") from None
    _fill(policy, optimizer, state, path)
    optimizer.updates, optimizer.skipped = state["trainer"]["updates"], state["trainer"]["skipped"]
    for name, (model, its_optimizer) in trained.items():
        if name != "policy":
            _fill(model, its_optimizer, state[name], path)
            its_optimizer.updates, its_optimizer.skipped = state[name]["counts"]
    if world == policy.layout.world:
        _set_random(state["random"])
    return state["trainer"]


def _keep_extra_states(state: dict[str, Any], trained: TrainedModels, path: Path) -> None:
    """Layers' extra states (FP8's scales, or nothing at all) that the checkpoint lacks stay as they are: a run with
    other layers (model.spec) has saved it."""
    saved = load_sharded_metadata(str(path))
    for name in trained:
        for stage in (state if name == "policy" else state[name])["model"].values():
            for key, part in stage.items():
                if key.endswith("_extra_state") and part.unique_key not in saved:
                    stage[key] = LocalNonpersistentObject(part.data)


def _fill(model: Model, optimizer: Optimizer, state: dict[str, Any], path: Path) -> None:
    with _trusted_scales():
        model.load_state_dict(state["model"])
    adam = state["optimizer"].get("optimizer", state["optimizer"])  # one level down where bf16 weights have masters
    _keep_rates(adam["param_groups"], optimizer, path)
    optimizer.adapt(state["optimizer"])
    optimizer.inner.load_state_dict(state["optimizer"])
    optimizer.schedule.num_steps = 0
    optimizer.schedule.step(increment=state["schedule_steps"])


@contextmanager
def _trusted_scales() -> Iterator[None]:
    """Transformer Engine keeps the scales of the recipe `delayed` pickled, and loads them only where it is told that
    they can be trusted: a run trusts its own checkpoints."""
    with patch.dict(os.environ, NVTE_ALLOW_UNSAFE_PICKLE_EXTRA_STATE="1"):
        yield


def _policy_of(trained: TrainedModels) -> tuple[Policy, Optimizer]:
    policy, optimizer = trained["policy"]
    assert isinstance(policy, Policy)
    return policy, optimizer


def _critic_of(trained: TrainedModels) -> str | None:
    """The trunk of the run's critic, as the settings call it."""
    return "own" if "critic" in trained else "shared" if _policy_of(trained)[0].with_value else None


def _reason(error: BaseException) -> str:
    """The first line of it; torch wraps what went wrong on some rank."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error).strip().split("\n")[0]


@contextmanager
def _quietly() -> Iterator[None]:
    """Without what torch says of how Megatron calls it: nothing that a user of either could change."""
    with warnings.catch_warnings():
        for message in ("torch.distributed is disabled", "The argument order of load", "Please use DTensor instead"):
            warnings.filterwarnings("ignore", message=message)
        yield


def check_model(path: str | Path, arch: Architecture) -> None:
    """Refuse a model.path whose tensors are not those of its config.json, before any rank starts."""
    if is_megatron(path) or any(Path(path).glob("*.distcp")):
        for name in (".metadata", "metadata.json"):  # what the load needs; the other files are asked for by name
            if not (Path(path) / name).is_file():
                raise ConfigError(f"{path}: {name} is missing; {AGAIN}")
        MegatronTensors(Path(path), arch)
    else:
        folder = HfFolder(path)
        folder.check(arch)
        folder.tell_left_alone()


def load_model(model: Model, path: str | Path) -> None:
    """Fill the model from a Hugging Face folder or a Megatron checkpoint; log Z and values stay as they are.
    Collective."""
    if is_megatron(path):
        load_megatron(model, Path(path))
    else:
        load_hf(model, path)


@torch.no_grad()
def load_megatron(model: Model, path: Path) -> None:
    """Fill the model's shards from a Megatron checkpoint of whatever layout and layer spec. Collective."""
    # The extra states are FP8's scales: another spec has others, and a new run starts with fresh ones.
    state = {
        str(vp_stage): {k: part for k, part in stage.gpt.sharded_state_dict().items() if not k.endswith("_extra_state")}
        for vp_stage, stage in enumerate(model.stages)
    }
    try:
        with _quietly():
            loaded = dist_checkpointing.load({"model": state}, str(path))["model"]
    except UNFIT as error:
        raise ConfigError(f"{path}: is not a checkpoint of this model ({_reason(error)})") from None
    for vp_stage, stage in enumerate(model.stages):
        for name, parameter in stage.gpt.named_parameters():
            fill(parameter, loaded[str(vp_stage)][name])


def _keep_rates(saved: list[dict[str, Any]], optimizer: Optimizer, path: Path) -> None:
    """Put the configured learning rates into the saved parameter groups, so that a resumed run can change them.

    Megatron tells groups apart by their rates. Their order does not depend on the rates, only their number does, by
    whether the partition function, or a shared critic's head, has one of its own.
    """
    groups = optimizer.inner.param_groups
    if len(saved) != len(groups):
        raise ConfigError(
            f"optimizer.log_z_lr = {optimizer.settings.log_z_lr}: {path} was saved "
            f"{'without' if len(saved) < len(groups) else 'with'} a rate of its own for log Z (or a shared critic's "
            "head, critic.optimizer.lr); keep it so"
        )
    for old, new in zip(saved, groups, strict=True):
        old.update({name: new[name] for name in ("max_lr", "min_lr") if name in new})


def _check_fits(path: Path, arch: Architecture, log_z: LogZ | None, critic: str | None) -> dict[str, Any]:
    """The checkpoint's common part, which says what model it was made for."""
    with _quietly():
        common = dist_checkpointing.load_common_state_dict(str(path))
    for name, wanted in _made_for(arch, log_z, critic).items():
        found = common["made_for"].get(name)
        if found != wanted:
            raise ConfigError(
                f"{path}: is of another model or objective: its {name} is {found!r}, these settings make {wanted!r}; "
                "set model.path and objective as they were, or choose another run_dir"
            )
    return common


def _made_for(arch: Architecture, log_z: LogZ | None, critic: str | None) -> dict[str, Any]:
    """What must be the same when a checkpoint is loaded, in plain values."""
    kind = log_z and log_z.kind.removesuffix("-detached")  # which has the same parameters
    fields = {field.name: getattr(arch, field.name) for field in dataclasses.fields(arch)}
    return {**fields, "inv_freq": [f"{x:.4g}" for x in arch.inv_freq.tolist()], "log_z": kind, "critic": critic}


def _state(trained: TrainedModels, is_loading: bool) -> dict[str, Any]:
    """The policy's state, and the others' under their names."""
    state = _state_of(*trained["policy"], "", is_loading)
    for name, (model, optimizer) in trained.items():
        if name != "policy":
            counts = (optimizer.updates, optimizer.skipped)
            state[name] = {**_state_of(model, optimizer, f"{name}.", is_loading), "counts": counts}
    return state


def _state_of(model: Model, optimizer: Optimizer, prefix: str, is_loading: bool) -> dict[str, Any]:
    sharded = model.sharded_state_dict()
    add_prefix_for_sharding(sharded, prefix)
    # The schedule's settings are the configuration's, so that a resumed run can change them; only its count is state.
    return {
        "model": sharded,
        "optimizer": optimizer.sharded_state_dict(sharded, is_loading),
        "schedule_steps": optimizer.schedule.num_steps,
    }


def _sharded_random(layout: Layout) -> ShardedObject:
    states = {
        "python": random.getstate(),
        "numpy": np.random.get_state(),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state(),
    }
    return ShardedObject("random", [states], (layout.world,), (layout.rank,))


def _set_random(states: list[dict[str, Any]]) -> None:
    random.setstate(states[0]["python"])
    np.random.set_state(states[0]["numpy"])
    torch.set_rng_state(states[0]["torch"])
    torch.cuda.set_rng_state(states[0]["cuda"])
