"""TensorBoard, imported only when it is switched on. Its event files lie in the run folder, under tensorboard/."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError

FOLDER = "tensorboard"


def check_tensorboard(is_on: bool) -> None:
    """ConfigError where it is asked for and not installed."""
    if not is_on:
        return
    try:
        import torch.utils.tensorboard  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"monitor.tensorboard = true: tensorboard cannot be imported ({error}); pip install "
            "flowrl-mega[tensorboard], or set monitor.tensorboard=false"
        ) from None


class TensorBoardLog:
    """The metrics as scalars under their own names, residuals as histograms."""

    def __init__(self, run_dir: Path, resume_step: int) -> None:
        check_tensorboard(True)
        from torch.utils.tensorboard import SummaryWriter

        # What an interrupted run wrote after `resume_step` is hidden: the steps that are repeated count.
        purge = resume_step + 1 if resume_step else None
        self._writer = SummaryWriter(str(run_dir / FOLDER), purge_step=purge)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        for name, value in metrics.items():
            if isinstance(value, int | float) and math.isfinite(value):
                self._writer.add_scalar(name, value, step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.log(step, {f"evaluation/{name}": value for name, value in metrics.items()})

    def distributions(self, step: int, record: Mapping[str, Any]) -> None:
        residual = record.get("residual")
        if not residual:
            return
        edges, counts = residual["edges"], residual["counts"]
        middles = [(low + high) / 2 for low, high in zip(edges, edges[1:], strict=False)]
        self._writer.add_histogram_raw(
            "loss/residual",
            min=edges[0],
            max=edges[-1],
            num=sum(counts),
            sum=sum(n * x for n, x in zip(counts, middles, strict=True)),
            sum_squares=sum(n * x * x for n, x in zip(counts, middles, strict=True)),
            bucket_limits=edges[1:],
            bucket_counts=counts,
            global_step=step,
        )

    def close(self) -> None:
        self._writer.close()
