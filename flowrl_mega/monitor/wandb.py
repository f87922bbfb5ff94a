"""Weights & Biases, imported only when it is switched on. Its files lie in the run folder, under wandb/."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.run_id import run_id

MODES = ("off", "offline", "online")
ANSWER = ("text", "count", "reward", "empirical", "target")  # columns, of a record's answers


def check_wandb(mode: str) -> None:
    """ConfigError if `mode` is unknown or needs a wandb that is not installed."""
    if mode not in MODES:
        raise ConfigError(f"monitor.wandb = {mode!r}: must be one of {', '.join(MODES)}")
    if mode == "off":
        return
    try:
        import wandb  # noqa: F401
    except ImportError as error:
        raise ConfigError(
            f"monitor.wandb = {mode}: wandb cannot be imported ({error}); pip install wandb, or set monitor.wandb=off"
        ) from None


class WandbLog:
    """One wandb run. A resumed run goes on under the id that the first one stored in the run folder."""

    def __init__(self, run_dir: Path, config: Mapping[str, Any], mode: str, project: str, resume: bool) -> None:
        check_wandb(mode)
        import wandb

        try:
            self._run = wandb.init(
                mode="offline" if mode == "offline" else "online",
                project=project,
                dir=str(run_dir),
                name=run_dir.resolve().name,
                config=dict(config),
                id=run_id(run_dir / "wandb", resume),
                resume="allow",
                settings=wandb.Settings(silent=True, console="off"),
            )
        except wandb.Error as error:
            raise ConfigError(
                f"monitor.wandb = {mode}: wandb does not start ({error}); "
                "run `wandb login`, or set monitor.wandb=offline"
            ) from error
        # Our own step is the axis: wandb's only ever grows, and would refuse the steps that a resumed run repeats.
        self._run.define_metric("*", step_metric="step")

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **metrics})

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._run.log({"step": step, **{f"evaluation/{name}": value for name, value in metrics.items()}})

    def distributions(self, step: int, record: Mapping[str, Any]) -> None:
        """The histogram of residuals, log Z of each prompt against its group's own estimate, and a table of answers:
        how often each was drawn, and what the target gives to it."""
        import wandb

        pictures: dict[str, Any] = {}
        if residual := record.get("residual"):
            histogram = wandb.Histogram(np_histogram=(residual["counts"], residual["edges"]))
            pictures["loss/residual_histogram"] = histogram
        if log_z := record.get("log_z"):
            rows = list(zip(log_z["group"], log_z["logged"], strict=True))
            table = wandb.Table(columns=["the group's own", "logged"], data=rows)
            pictures["loss/log_z_calibration"] = wandb.plot.scatter(table, *table.columns, title="log Z")
        answers = [(of["prompt"], answer) for of in record.get("prompts", []) for answer in of["answers"]]
        if answers:
            shares = [[prompt, *(answer.get(name) for name in ANSWER)] for prompt, answer in answers]
            pictures["target/answers"] = wandb.Table(columns=["prompt", *ANSWER], data=shares)
        if pictures:
            self._run.log({"step": step, **pictures})

    def saved(self, step: int, checkpoint: Path) -> None:
        """The checkpoint as an artifact of the run, a version each; its files are not copied first."""
        import wandb

        artifact = wandb.Artifact(f"checkpoint-{self._run.id}", type="model", metadata={"step": step})
        artifact.add_dir(str(checkpoint), policy="immutable")
        self._run.log_artifact(artifact, aliases=[f"step_{step}"])

    def close(self) -> None:
        self._run.finish()
