"""Trackio, imported only when it is switched on. Its database lies where trackio keeps all of them, so `trackio show`
finds the run beside others."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.run_id import run_id


def check_trackio(is_on: bool) -> None:
    """ConfigError where it is asked for and not installed."""
    if not is_on:
        return
    try:
        import trackio  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"monitor.trackio = true: trackio cannot be imported ({error}); pip install flowrl-mega[trackio], or set "
            "monitor.trackio=false"
        ) from None


class TrackioLog:
    """One trackio run, NAME-ID. A resumed run goes on in it; trackio keeps the steps that it repeats twice."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], project: str, resume: bool) -> None:
        check_trackio(True)
        import trackio

        name = f"{run_dir.resolve().name}-{run_id(run_dir / 'trackio', resume)}"
        with redirect_stdout(sys.stderr):  # what it says of itself is no output of a run
            self._run = trackio.init(
                project=project,
                name=name,
                config=dict(config),
                resume="allow",
                embed=False,
                auto_log_gpu=False,
                auto_log_cpu=False,
            )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log(dict(metrics), step=step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self.log(step, {f"evaluation/{name}": value for name, value in metrics.items()})

    def distributions(self, step: int, record: Mapping[str, Any]) -> None:
        import trackio

        if residual := record.get("residual"):
            histogram = trackio.Histogram(np_histogram=(residual["counts"], residual["edges"]))
            self.log(step, {"loss/residual_histogram": histogram})

    def close(self) -> None:
        import trackio

        with redirect_stdout(sys.stderr):
            trackio.finish()
