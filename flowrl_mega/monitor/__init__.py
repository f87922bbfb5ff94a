"""A run's outputs (run folder, console, wandb, TensorBoard, trackio) behind one `Monitor`.

Metrics are named as in metric_names.py.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from flowrl_mega.monitor.console import Console
from flowrl_mega.monitor.run_folder import RunFolder
from flowrl_mega.monitor.tensorboard import TensorBoardLog, check_tensorboard
from flowrl_mega.monitor.trackio import TrackioLog, check_trackio
from flowrl_mega.monitor.wandb import WandbLog, check_wandb

__all__ = ["Monitor", "RunFolder", "check_tensorboard", "check_trackio", "check_wandb"]


class Sink(Protocol):
    """Receives a run's metrics."""

    def log(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None: ...
    def distributions(self, step: int, record: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Monitor:
    """Sends each step's numbers to the run folder, the console, wandb, TensorBoard and trackio. Made on rank 0 only.

    Steps count from 1; `resume_step` is the last step that is already done (0: a fresh run). Whatever an interrupted
    run wrote after it is dropped, and metrics that it wrote under old names get the new ones (metric_names.py).
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        total_steps: int,
        resume_step: int = 0,
        wandb: str = "off",
        project: str = "flowrl-mega",
        progress: bool = True,
        tensorboard: bool = False,
        wandb_checkpoints: bool = False,
        trackio: bool = False,
    ) -> None:
        check_wandb(wandb)  # before anything is written
        check_tensorboard(tensorboard)
        check_trackio(trackio)
        self.folder = RunFolder(run_dir)
        # A run that starts over must also lose the evaluation that its predecessor made before step 1.
        self.folder.truncate(resume_step if resume_step > 0 else -1)
        self.folder.write_config(config, resume_step)
        self._sinks: list[Sink] = [self.folder]
        self._wandb: WandbLog | None = None
        if wandb != "off":
            log = WandbLog(self.folder.path, config, wandb, project, resume=resume_step > 0)
            self._sinks.append(log)
            self._wandb = log if wandb_checkpoints else None
        if tensorboard:
            self._sinks.append(TensorBoardLog(self.folder.path, resume_step))
        if trackio:
            self._sinks.append(TrackioLog(self.folder.path, config, project, resume=resume_step > 0))
        if progress:
            self._sinks.append(Console(total_steps, resume_step))

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The metrics of one training step."""
        for sink in self._sinks:
            sink.log(step, metrics)

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        """Some of the step's prompts, responses and rewards, for people to read."""
        self.folder.samples(step, rows)

    def distributions(self, step: int, record: Mapping[str, Any]) -> None:
        """What monitor/distributions.py says of a step."""
        for sink in self._sinks:
            sink.distributions(step, record)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """The metrics of an evaluation after `step` steps (0: before the first)."""
        for sink in self._sinks:
            sink.evaluation(step, metrics)

    def saved(self, step: int, checkpoint: Path) -> None:
        """A checkpoint is whole on the disk."""
        if self._wandb:
            self._wandb.saved(step, checkpoint)

    def close(self) -> None:
        """Ends the progress bar and the wandb run; the files are always complete."""
        for sink in self._sinks:
            sink.close()
