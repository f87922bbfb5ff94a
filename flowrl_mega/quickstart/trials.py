"""The quick start's trials: what one is, starting the ranks on some (job.py), and what they came to."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from flowrl_mega.config import Config
from flowrl_mega.config_file import load_config

Figures = dict[str, float]
CONFIG = Path(__file__).with_name("quickstart.yaml")
# What each rank runs; Ctrl-C may come while it imports.
RANK = """
import sys
try:
    from flowrl_mega.quickstart.job import main
    code = main(sys.argv[1])
except KeyboardInterrupt:
    code = 130
sys.exit(code)
"""


class Trial(NamedTuple):
    """One training run of the quick start's task."""

    folder: str  # that of its warm start, which has the same seed
    seed: int
    name: str
    overrides: list[str]  # of quickstart.yaml

    @property
    def run_dir(self) -> Path:
        """Beside the warm start's model, which is FOLDER/start."""
        name = self.name.replace(",", "").replace(" ", "_")
        return Path(self.folder) / (name if name != "start" else "start_run")

    def config(self, overrides: Sequence[str] = ()) -> Config:
        """Its settings, with `overrides` that its own win over. ConfigError where one is wrong."""
        own = [f"seed={self.seed}", f"model.path={Path(self.folder) / 'start'}", f"run_dir={self.run_dir}"]
        return load_config(CONFIG, [*overrides, *self.overrides, *own])

    @property
    def file(self) -> Path:
        """Where the figures are written when it ends."""
        return self.run_dir / "figures.json"

    @property
    def done(self) -> bool:
        """With these very overrides: settings may have changed since."""
        return self.file.exists() and json.loads(self.file.read_text())["overrides"] == self.overrides

    @property
    def figures(self) -> Figures:
        """What it came to; the trial must be done."""
        return dict(json.loads(self.file.read_text())["figures"])


def run_trials(
    trials: Sequence[Trial],
    file: Path,
    side_by_side: bool = False,
    timeout_s: float | None = 3600,
    ranks: int | None = None,
    may_diverge: bool = False,
) -> int:
    """Start the ranks on these trials, written to `file`; the exit code. Two ranks, but one on a single GPU: together
    with tp = 2, or side by side, each on every other trial. `may_diverge`: that is a result and ends nothing."""
    from flowrl_mega.parallel.launch import launch  # seconds, which --help and wrong settings need not wait

    ranks = ranks or (1 if gpus() == 1 else 2)
    for trial in trials:
        Path(trial.folder).mkdir(parents=True, exist_ok=True)
    content = {
        "trials": [trial._asdict() for trial in trials],
        "side_by_side": side_by_side,
        "may_diverge": may_diverge,
        "overrides": [f"parallel.tp={1 if side_by_side else ranks}"],
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(content, indent=1))
    return launch([sys.executable, "-c", RANK, str(file)], ranks, timeout_s=timeout_s)


def gpus() -> int:
    import torch

    # Where there is none, Megatron needs device_count() to say 1 all the same (parallel/cuda_is_cpu.py).
    return torch.cuda.device_count() if torch.cuda.is_available() else 0
