"""Which runs are seeds of one method, and what sets the methods apart."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flowrl_mega.report.run import Run

OF_A_SEED = ("seed", "run_dir")  # all else makes another method
SEED_FOLDER = re.compile(r"(?<=/)seed_\d+(?=/)")  # in a path: each seed may have its own start
MOST_NAMED = 3  # settings that a label can hold


@dataclass
class Method:
    label: str
    runs: list[Run]
    varied: dict[str, Any]  # the settings in which methods differ; those that this one lacks are missing


def methods_of(runs: Sequence[Run]) -> list[Method]:
    """Runs of the same settings but seed, run_dir and the seed_N in a path are one; a run whose settings are not known
    stands alone."""
    groups: dict[str, list[Run]] = {}
    for run in runs:
        known = json.dumps(_own(run), sort_keys=True, default=str) if run.settings else str(run.path)
        groups.setdefault(known, []).append(run)
    members = list(groups.values())
    every = [_own(of[0]) for of in members]
    names = [name for name in dict.fromkeys(name for own in every for name in own) if _differs(every, name)]
    varied = [{name: own[name] for name in names if name in own} for own in every]
    labels = [_label(of, settings, names) for of, settings in zip(members, varied, strict=True)]
    return [Method(*all_of) for all_of in zip(_unique(labels), members, varied, strict=True)]


def _own(run: Run) -> dict[str, Any]:
    return {
        name: SEED_FOLDER.sub("seed_N", value) if isinstance(value, str) else value
        for name, value in run.settings.items()
        if name not in OF_A_SEED
    }


def _differs(every: Sequence[dict[str, Any]], name: str) -> bool:
    return len({json.dumps(own[name], sort_keys=True, default=str) if name in own else None for own in every}) > 1


def _label(runs: Sequence[Run], varied: dict[str, Any], names: Sequence[str]) -> str:
    """The settings where they are few, else the folder, of seeds the one around them."""
    if varied and len(names) <= MOST_NAMED:
        return ", ".join(f"{name.rpartition('.')[2]} {'null' if v is None else v}" for name, v in varied.items())
    folder = runs[0].path.resolve()
    return folder.parent.name if len(runs) > 1 and folder.name.startswith("seed") else folder.name or str(folder)


def _unique(labels: Sequence[str]) -> list[str]:
    """A number behind every label that came before."""
    return [
        f"{label} ({seen})" if (seen := labels[: at + 1].count(label)) > 1 else label for at, label in enumerate(labels)
    ]
