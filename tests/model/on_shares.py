"""What ranks with Transformer Engine run to save moments in shares and go on from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from on_ranks import config_for, start

from flowrl_mega.config import ConfigError
from flowrl_mega.experience import Experience
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.preflight import check_optimizers
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


def _result(job: Run, step: Experience) -> Trained:
    (stage,) = job.models.learner.stages
    shares, overlap = stage.ddp_config.use_distributed_optimizer, stage.ddp_config.overlap_grad_reduce
    metrics = _train(job, step)
    job.close()
    return Trained(shares, overlap, metrics)


def _train(job: Run, step: Experience) -> list[dict[str, float]]:
    return [merge_updates([job.trainer.update(batch)]) for batch in job.trainer.micro_batches(step)]


def refused(path: Path, sections: dict[str, Any], world: int, checkpoint: Path) -> str:
    """What is said to these settings with the checkpoint; nothing where they can go on."""
    try:
        check_optimizers(config_for(path, **sections), world, checkpoint)
    except ConfigError as error:
        return str(error)
    return ""
