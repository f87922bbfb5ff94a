"""The work that every benchmark here does, whoever does it. Standard library only: TRL's environment imports it too."""

from __future__ import annotations

import json
import os
import platform
import statistics
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from datetime import date
from importlib.metadata import version
from pathlib import Path
from typing import Any, TypeVar

T = TypeVar("T")
NAMES = "Lily Tom Anna Ben Mia Max Sara Tim Lucy Sam Ella Jack Amy Leo Kate Bob".split()

WARM_UP_STEPS = 2  # of a job, not counted


def prompts(n: int) -> list[str]:
    return [f"Once upon a time {NAMES[i % len(NAMES)]} found {i + 1}" for i in range(n)]


def distinct_letters(text: str) -> float:
    """A reward that is free and differs within a group, so that advantages are not all zero."""
    return float(len(set(text)))


def machine(*packages: str) -> dict[str, Any]:
    """What the figures were measured on, with what, by which command, and when."""
    cpu = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), ": unknown")
    return {
        "cpu": cpu.split(":")[-1].strip(),
        "cores": os.cpu_count(),
        "gpu": _gpu(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "date": date.today().isoformat(),
        "command": " ".join(["python", *sys.argv]),
    }


def _gpu() -> str | None:
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else None


def turns(names: Iterable[str], rounds: int) -> Iterator[str]:
    """Every name once a round; each round begins with the next one, so that none always comes first."""
    order = list(names)
    for turn in range(rounds):
        first = turn % len(order)
        yield from order[first:] + order[:first]


def in_turns(works: Mapping[str, Callable[[], T]], rounds: int) -> dict[str, list[T]]:
    """What each work returned, by round."""
    found: dict[str, list[T]] = {name: [] for name in works}
    for name in turns(works, rounds):
        found[name].append(works[name]())
    return found


def median_of(steps: Iterable[dict[str, float]], name: str) -> float:
    return statistics.median(step[name] for step in steps)


def write(path: str | None, machine_: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """The results file, where one was asked for."""
    if path:
        Path(path).write_text(json.dumps({"machine": machine_, "rows": rows}, indent=1) + "\n")
