"""Start the ranks of a job on this machine, and bring all of them down when one fails.

torchrun and srun start ranks too; then this module only reads their environment.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence


def started_by_launcher() -> bool:
    """True where torchrun or srun (or we) already started this process as one rank of a job.

    srun names things differently; it is translated to torchrun's names here, so that nobody else has to know.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return True
    if "SLURM_PROCID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return False
    env["RANK"], env["WORLD_SIZE"] = env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"]
    env["LOCAL_RANK"] = env["SLURM_LOCALID"]
    env.setdefault("MASTER_ADDR", env.get("SLURM_LAUNCH_NODE_IPADDR", "127.0.0.1"))
    env.setdefault("MASTER_PORT", str(20000 + int(env.get("SLURM_JOB_ID", "0")) % 20000))
    return True


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """A rank's environment: torchrun's names, and cores shared out so that ranks do not fight over them."""
    threads = str(max(1, (os.cpu_count() or 1) // world))
    return {
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", threads) if world == 1 else threads,
        "GLOO_SOCKET_IFNAME": os.environ.get("GLOO_SOCKET_IFNAME", "lo"),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(command: Sequence[str], world: int, timeout_s: float | None = None, grace_s: float = 30.0) -> int:
    """Run `command` once a rank; the exit code is the first failing rank's, 0 when all succeed.

    A failing rank ends the others (after `grace_s`, forcibly); SIGTERM and SIGINT are passed on to all;
    past `timeout_s` all are ended and the code is 124. Each rank writes to this process's own output.
    """
    port = free_port()
    ranks = [subprocess.Popen(list(command), env=rank_environment(rank, world, port)) for rank in range(world)]
    previous = {s: signal.signal(s, lambda number, _: _signal(ranks, number)) for s in (signal.SIGTERM, signal.SIGINT)}
    deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
    try:
        while True:
            codes = [rank.poll() for rank in ranks]
            failed = [(rank, code) for rank, code in enumerate(codes) if code not in (None, 0)]
            if failed:
                return _bring_down(ranks, failed[0], grace_s)
            if all(code == 0 for code in codes):
                return 0
            if time.monotonic() > deadline:
                print(f"the job ran past its {timeout_s:g} s and was ended", file=sys.stderr)
                _end(ranks, grace_s=0)
                return 124
            time.sleep(0.02)
    finally:
        _end(ranks, grace_s=0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def _bring_down(ranks: list[subprocess.Popen[bytes]], failed: tuple[int, int | None], grace_s: float) -> int:
    """End the other ranks. Exit codes 2 and 75 are agreed by all ranks, so the others are about to end by themselves."""
    rank, code = failed
    agreed = code in (2, 75)
    if not agreed:
        print(f"rank {rank} failed with exit code {code}; ending the other ranks", file=sys.stderr)
    _end(ranks, grace_s if agreed else 1.0)
    return code if code is not None and code > 0 else 1


def _signal(ranks: list[subprocess.Popen[bytes]], number: int) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.send_signal(number)


def _end(ranks: list[subprocess.Popen[bytes]], grace_s: float) -> None:
    """Wait `grace_s`, then kill what is left."""
    end = time.monotonic() + grace_s
    while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()
