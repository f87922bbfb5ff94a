"""What ranks do for test_reshard: updates on recorded rollouts, and all of a job's state as whole tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from on_ranks import config_for
from torch import Tensor

from flowrl_mega.checkpoint import save_checkpoint
from flowrl_mega.experience import Experience
from flowrl_mega.model.names import from_shards, to_named
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.packing import Sequence
from flowrl_mega.preflight import Inputs
from flowrl_mega.rewards.load import Score
from flowrl_mega.rollout import Rollout
from flowrl_mega.run import Run


class State(NamedTuple):
    """Everything that the next update depends on, under names that no layout changes."""

    tensors: dict[str, Tensor]  # "weight/...", "exp_avg/...", "exp_avg_sq/..."
    updates: int
    lr: float
    loss: float | None  # of the update that led here
    log_z: float | None


def save(path: Path, run_dir: Path, sequences: list[Sequence], rewards: list[float], **sections: Any) -> State:
    """Three updates from the folder's weights, then a checkpoint."""
    job = _run(path, None, sections)
    for _ in range(3):
        metrics = _update(job, sequences, rewards)
    save_checkpoint(run_dir, job.models.trained(), {"step": 3}, keep_last=1)
    return _state(job, metrics)


def load(
    path: Path, checkpoint: Path, sequences: list[Sequence], rewards: list[float], forget: bool = False, **sections: Any
) -> tuple[State, State]:
    """The state as loaded, and after one more update; `forget` loses Adam's moments on the way."""
    job = _run(path, checkpoint, sections)
    loaded = _state(job, {})
    if forget:
        for moments in _adam(job).state.values():
            moments["exp_avg"].zero_()
    return loaded, _state(job, _update(job, sequences, rewards))


def _run(path: Path, checkpoint: Path | None, sections: Any) -> Run:
    config = config_for(path, **sections)
    return Run(Inputs(config), layouts.init(config.parallel, config.seed), checkpoint)


def _update(job: Run, sequences: list[Sequence], rewards: list[float]) -> dict[str, float]:
    sizes = [len(s.response) for s in sequences]
    rollouts = [Rollout(s.response, [0.0] * n, "stop", [(0, n)]) for s, n in zip(sequences, sizes, strict=True)]
    scores = [Score(reward, "", failed=False) for reward in rewards]
    (batches,) = job.trainer.micro_batches(Experience(sequences, rollouts, scores))
    return merge_updates([job.trainer.update(batches)])


def _adam(job: Run) -> Any:
    (optimizer,) = job.models.learner.optimizer.inner.chained_optimizers
    return optimizer.optimizer


def _state(job: Run, metrics: dict[str, float]) -> State:
    tensors: dict[str, Tensor] = {}
    for name, parameter in job.models.policy.named_parameters():
        moments = _adam(job).state[parameter]
        for kind, part in {"weight": parameter, **moments}.items():
            if torch.is_tensor(part) and part.shape == parameter.shape:
                tensors.update({f"{kind}/{place}": tensor for place, tensor in _whole(job, name, part.detach())})
    stages: list[Any] = [None] * job.layout.pp
    dist.all_gather_object(stages, tensors, group=job.layout.pp_group)
    tensors = {name: tensor for stage in stages for name, tensor in stage.items()}
    state = job.models.learner.optimizer
    loss, log_z = metrics.get("loss/policy"), metrics.get("loss/log_z")
    return State(tensors, state.updates, state.inner.param_groups[0]["lr"], loss, log_z)


def _whole(job: Run, name: str, part: Tensor) -> list[tuple[str, Tensor]]:
    layout, short = job.layout, name.removeprefix("gpt.")
    shards = [torch.empty_like(part) for _ in range(layout.tp)]
    dist.all_gather(shards, part.contiguous(), group=layout.tp_group)
    whole = from_shards(short, shards).clone()
    if short == name:
        return [(name, whole)]
    return [(f"{short}.{i}", tensor) for i, tensor in enumerate(to_named(short, whole, job.models.policy.arch))]
