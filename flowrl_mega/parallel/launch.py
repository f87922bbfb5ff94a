"""Start the ranks of a job on this machine, and bring all of them down when one fails.

torchrun and srun start ranks too; then this module only reads their environment.
"""

from __future__ import annotations

import ctypes
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

Ranks = list[subprocess.Popen[bytes]]
AGREED = (2, 70, 75)  # wrong input, cannot go on, stopped on request: all ranks are about to end so by themselves
INTERRUPTED = 130


def started_by_launcher() -> bool:
    """True where torchrun or srun (or we) already started this process as one rank of a job.

    srun names things differently; it is translated to torchrun's names here, so that nobody else has to know.
    """
    env = os.environ
    if "RANK" in env and "WORLD_SIZE" in env:
        return True
    # A shell inside an allocation is a "step" of one task, too; only srun with several tasks means a job of ranks.
    if "SLURM_PROCID" not in env or int(env.get("SLURM_STEP_NUM_TASKS", "1")) < 2:
        return False
    env["RANK"], env["WORLD_SIZE"], env["LOCAL_RANK"] = (
        env["SLURM_PROCID"], env["SLURM_STEP_NUM_TASKS"], env["SLURM_LOCALID"]
    )  # fmt: skip
    # Tasks by node, as in "4(x2),3"; should nodes differ, the first is where rank 0 starts its servers.
    env["LOCAL_WORLD_SIZE"] = env.get("SLURM_STEP_TASKS_PER_NODE", "1").split("(")[0].split(",")[0]
    env.setdefault("MASTER_ADDR", _first_host(env["SLURM_STEP_NODELIST"]))
    step = 64 * int(env["SLURM_JOB_ID"]) + int(env["SLURM_STEP_ID"])  # jobs that share a node need ports of their own
    env.setdefault("MASTER_PORT", str(15000 + step % 15000))
    return True


def _first_host(nodes: str) -> str:
    """Task 0's host: the first of a SLURM node list ("gpu[003-010,020],login1" -> "gpu003")."""
    names = re.match(r"(?:[^,\[]|\[[^\]]*\])+", nodes)
    assert names, f"SLURM_STEP_NODELIST = {nodes!r}"
    return re.sub(r"\[(\w+)[^\]]*\]", r"\1", names[0])


def rank_environment(rank: int, world: int, port: int) -> dict[str, str]:
    """A rank's environment: torchrun's names, and cores shared out so that ranks do not fight over them."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return {
        "OMP_NUM_THREADS": str(max(1, cores // world)),
        "GLOO_SOCKET_IFNAME": "lo",
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "LOCAL_WORLD_SIZE": str(world),
        "WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def launch(
    command: Sequence[str],
    world: int,
    timeout_s: float | None = None,
    grace_s: float = 30.0,
    agreed: Sequence[int] = AGREED,
) -> int:
    """Run `command` once a rank; the exit code is the first failing rank's, 0 when all succeed.

    A rank that a signal ended counts as 128 + its number, as in a shell. When one fails, the others get a second to
    say what they saw of it and are killed (`grace_s` where they are about to end by themselves: the codes `agreed`).
    SIGTERM and SIGINT are passed on to all ranks. Past `timeout_s` all are killed and the code is 124. Each rank writes
    to this process's own output. Should this process be killed, the kernel ends its ranks.
    """
    ranks: Ranks = []

    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)

    previous = {number: signal.signal(number, pass_on) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        port = free_port()
        for rank in range(world):
            environment = rank_environment(rank, world, port)
            ranks.append(subprocess.Popen(list(command), env=environment, preexec_fn=_end_with_parent))
        code = _wait(ranks, timeout_s, agreed)
        _end(ranks, grace_s if code in agreed else 1.0)
        return code
    finally:
        _end(ranks, grace_s=0)
        for number, handler in previous.items():
            signal.signal(number, handler)


def launch_job(command: Sequence[str], stop_requested: Callable[[], bool]) -> int:
    """Run a command that starts ranks of its own; returns its exit code, 128 + the number of a signal that ended it.

    It gets SIGTERM once `stop_requested` says so, and SIGINT where this process does; it ends with this process.
    """
    job = subprocess.Popen(list(command), preexec_fn=_end_with_parent)
    told = False
    try:
        while (code := job.poll()) is None:
            if stop_requested() and not told:
                job.terminate()
                told = True
            time.sleep(0.05)
    except KeyboardInterrupt:
        job.send_signal(signal.SIGINT)
        _end([job], grace_s=30.0)
        raise
    return code if code >= 0 else 128 - code


def _wait(ranks: Ranks, timeout_s: float | None, agreed: Sequence[int]) -> int:
    """Until all ranks have succeeded (0), one has failed (its exit code), or the time is over (124)."""
    deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        for rank, code in enumerate(codes):
            if code:
                code = code if code > 0 else 128 - code
                if code not in (*agreed, INTERRUPTED):
                    print(f"rank {rank} failed with exit code {code}; ending the other ranks", file=sys.stderr)
                return code
        if None not in codes:
            return 0
        if time.monotonic() > deadline:
            print(f"the job ran past its {timeout_s:g} s; ending all ranks", file=sys.stderr)
            return 124
        time.sleep(0.02)


def _end(ranks: Ranks, grace_s: float) -> None:
    """Wait `grace_s`, then kill what is left: a rank takes SIGTERM for a wish to save, which needs all of them."""
    end = time.monotonic() + grace_s
    while time.monotonic() < end and any(rank.poll() is None for rank in ranks):
        time.sleep(0.02)
    for rank in ranks:
        if rank.poll() is None:
            rank.kill()
        rank.wait()


def _end_with_parent() -> None:
    """In a new rank: ask the kernel for SIGKILL when the parent dies. Orphans would go on writing to the run folder."""
    if sys.platform == "linux":
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)
