"""What ranks with Transformer Engine run to save moments in shares and go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import torch
from on_ranks import start

# isort: split
from megatron.core import dist_checkpointing

from flowrl_mega.experience import Experience
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.run import Run


class Trained(NamedTuple):
    shares: bool
    overlap: bool
    metrics: list[dict[str, float]]  # of every update


def saved(path: Path, step: Experience, sections: dict[str, Any]) -> Trained:
    """A step of two updates, a checkpoint, and the step again."""
    job = start(path, **sections)
    _train(job, step)
    job.trainer.step_done = 1
    job.save()
    return _result(job, step)


def gone_on(path: Path, step: Experience, sections: dict[str, Any], checkpoint: Path) -> Trained:
    """The step again, from the checkpoint."""
    return _result(start(path, checkpoint, **sections), step)


def saved_again(path: Path, sections: dict[str, Any], checkpoint: Path) -> bool:
    """Load the checkpoint and save it under the run folder of these settings; whether the moments are in shares."""
    job = start(path, checkpoint, **sections)
    job.save()
    job.close()
    return job.models.learner.optimizer.settings.shares


def contents(checkpoint: Path) -> tuple[dict[str, torch.Tensor], set[int]]:
    """All tensors under the names that the files have for them, and the Adams' counts of updates."""
    adam = dist_checkpointing.load_common_state_dict(str(checkpoint))["optimizer"]
    groups = adam.get("optimizer", adam)["param_groups"]
    loaded = dist_checkpointing.load_plain_tensors(str(checkpoint))
    return {name: part for name, part in loaded.items() if torch.is_tensor(part)}, {group["step"] for group in groups}


def _result(job: Run, step: Experience) -> Trained:
    (stage,) = job.models.learner.stages
    shares, overlap = stage.ddp_config.use_distributed_optimizer, stage.ddp_config.overlap_grad_reduce
    metrics = _train(job, step)
    job.close()
    return Trained(shares, overlap, metrics)


def _train(job: Run, step: Experience) -> list[dict[str, float]]:
    return [merge_updates([job.trainer.update(batch)]) for batch in job.trainer.micro_batches(step)]
