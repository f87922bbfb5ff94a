"""Nodes that run `flowrl-mega serve` for a run, and where in its folder it finds their servers."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from flowrl_mega.config import ConfigError, RolloutSettings

LOOK_S, SAY_S = 0.5, 15.0


def node_name() -> str:
    """This node's name, as SLURM knows it where there is one."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def start_of_job() -> str:
    """What all processes of one start of a SLURM job have in common; elsewhere nothing."""
    job = os.environ.get("SLURM_JOB_ID", "")
    return f"{job}.{os.environ.get('SLURM_RESTART_COUNT', '0')}" if job else ""


def folder_of(run_dir: Path) -> Path:
    return run_dir / "servers" / "nodes"


@contextlib.contextmanager
def announced(run_dir: Path, urls: list[str]) -> Iterator[None]:
    """Meanwhile the run finds these servers of this node."""
    file = folder_of(run_dir) / f"{node_name()}.json"
    text = json.dumps({"urls": urls, "start": start_of_job()})
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}")
    part.write_text(text)
    part.replace(file)  # never half written
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                file.unlink()


def ports_of(run_dir: Path) -> list[int]:
    """Where this node's servers were before, in this start of the job: the run would look for them there."""
    found = _read(folder_of(run_dir) / f"{node_name()}.json") or {"urls": []}
    return [port for url in found["urls"] if (port := urlsplit(url).port)]


def find(settings: RolloutSettings, run_dir: Path) -> list[str]:
    """The servers of all `rollout.nodes`, once they are ready. ConfigError after `rollout.start_timeout_s`."""
    began = said = time.monotonic()
    folder = folder_of(run_dir)
    while True:
        found = {file.stem: node for file in sorted(folder.glob("*.json")) if (node := _read(file))}
        if len(found) > settings.nodes:
            raise ConfigError(
                f"rollout.nodes = {settings.nodes}: {len(found)} have announced servers in {folder} "
                f"({', '.join(found)}); end `flowrl-mega serve` on those that are for another run, or give their number"
            )
        if len(found) == settings.nodes:
            return [url for node in found.values() for url in node["urls"]]
        now = time.monotonic()
        there = f"{len(found)} of them have announced servers in {folder}" + (f" ({', '.join(found)})" if found else "")
        if now - began > settings.start_timeout_s:
            raise ConfigError(
                f"rollout.nodes = {settings.nodes}: {there} in rollout.start_timeout_s = {settings.start_timeout_s:g}; "
                "run `flowrl-mega serve` with the same settings on the others, see what it says there, or allow more"
            )
        if now - said >= SAY_S:
            said = now
            words = f"rollout.nodes = {settings.nodes}: waiting for {now - began:.0f} s, {there}"
            print(words, file=sys.stderr, flush=True)
        time.sleep(LOOK_S)


def _read(file: Path) -> dict[str, Any] | None:
    """What a node of this start of the job has announced."""
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return found if found.get("start") == start_of_job() else None
