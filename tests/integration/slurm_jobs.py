"""Jobs of the project's own sbatch on a cluster of the tests. Settings of the site are given as the script says."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "examples" / "slurm" / "train.sbatch"
SITE = ["--nodes=2", "--cpus-per-task=1", "--gpus-per-node=0", "--output=log"]


def submit(
    cluster: Cluster, work: Path, *arguments: str, ranks: int = 2, script: Path = SCRIPT, site: tuple[str, ...] = ()
) -> str:
    """The number of the job that runs `flowrl-mega train ARGUMENTS` on two nodes of so many ranks each."""
    # On one host ranks meet on the loopback device. The path is for a clone that is not installed in the environment.
    one_host = {"GLOO_SOCKET_IFNAME": "lo", "PYTHONPATH": str(ROOT)}
    options = (*SITE, f"--ntasks-per-node={ranks}", *site)
    return cluster.call("sbatch", "--parsable", *options, str(script), *arguments, cwd=work, **one_host)


def until(condition: Callable[[], Any], work: Path, timeout: float = 240) -> None:
    end = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < end, f"nothing happened\n{log(work)}"
        time.sleep(0.05)


def log(work: Path) -> str:
    return (work / "log").read_text() if (work / "log").exists() else "(no log)"


def ended(cluster: Cluster, number: str, work: Path) -> dict[str, str]:
    """JobState, ExitCode, Restarts and so on of the job at its end, and its log."""
    return cluster.wait(number, 300) | {"log": log(work)}
