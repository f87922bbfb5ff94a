"""What every trial came to, in one file that goes with the project: the runs themselves are not kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_mega.quickstart.trials import Figures, Trial
from flowrl_mega.whole_file import write_whole
from tools.benchmarks.workload import machine

KEPT = ("pass_rate", "distinct", "coverage", "held_out_pass_rate", "held_out_distinct", "entropy", "kl", "diverged")


@dataclass
class Results:
    """A trial is known by its part, age, seed and overrides: settings that have changed since are another trial."""

    file: Path

    def __post_init__(self) -> None:
        content: dict[str, Any] = json.loads(self.file.read_text()) if self.file.exists() else {}
        self.machines: list[dict[str, Any]] = content.get("machines", [])
        self.rows: dict[str, dict[str, Any]] = {_key(row): row for row in content.get("trials", [])}

    def figures(self, part: str, ahead: int, trial: Trial) -> Figures | None:
        row = self.rows.get(_key(_row(part, ahead, trial)))
        return dict(row["figures"]) if row else None

    def add(self, part: str, ahead: int, trials: Sequence[Trial]) -> None:
        """Takes over the figures of trials that have ended, and writes the file."""
        here = machine("torch", "megatron-core") | {"command": "python -m examples.staleness.run"}
        if here not in self.machines:
            self.machines.append(here)
        for trial in trials:
            figures = {name: round(value, 6) for name, value in trial.figures.items() if name in KEPT}
            row = _row(part, ahead, trial) | {"machine": self.machines.index(here), "figures": figures}
            self.rows[_key(row)] = row
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        head = json.dumps(self.machines, indent=1)
        write_whole(self.file, f'{{"machines": {head},\n"trials": [\n{lines}\n]}}\n')


def _row(part: str, ahead: int, trial: Trial) -> dict[str, Any]:
    return {"part": part, "ahead": ahead, "name": trial.name, "seed": trial.seed, "overrides": trial.overrides}


def _key(row: dict[str, Any]) -> str:
    return json.dumps([row["part"], row["ahead"], row["name"], row["seed"], row["overrides"]])
