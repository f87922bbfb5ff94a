"""What runs here: versions, processors and the commit, for whoever reads a result later."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import subprocess
import time
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("flowrl-mega", "torch", "transformers", "megatron-core", "transformer-engine", "math-verify")


def versions() -> dict[str, str | None]:
    return {name: _version(name) for name in PACKAGES} | {"python": platform.python_version()}


def machine() -> dict[str, Any]:
    """Of this process's host."""
    return {"cpus": os.cpu_count(), "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None}


def start(step: int, ranks: int) -> dict[str, Any]:
    """An entry of run.json: a run that begins or goes on after `step` steps, on so many ranks, a GPU each if any."""
    gpu = machine()["gpu"]
    return {
        "at": time.strftime("%F %T"),
        "step": step,
        "ranks": ranks,
        "gpus": ranks if gpu else 0,
        "device": gpu or processor(),
        "versions": versions(),
        "commit": commit(),
    }


def processor() -> str:
    """The CPU's name, where the system says it."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    named = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(named, platform.processor() or platform.machine())


def commit() -> str | None:
    """Of the sources that run, with a mark where they were changed since; None outside a clone."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None
