"""Start the ranks of a job on this machine, and bring all of them down when one fails.

torchrun and srun start ranks too (launched.py).
"""

from __future__ import annotations

import ctypes
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence

import torch.distributed as dist

from flowrl_mega.faults import INTERRUPTED, Fault, FaultRecord
from flowrl_mega.hangup import outlive_the_terminal, stop_signals

Ranks = list[subprocess.Popen[bytes]]
AGREED = (2, 70, 75)  # wrong input, cannot go on, stopped on request: all ranks are about to end so by themselves
ENDS_S = 5.0  # longer than ranks take to end by themselves after another's fault (faults.GRACE_S)


def rank_environment(rank: int, world: int, port: int = 0) -> dict[str, str]:
    """One rank's environment: torchrun's names, and an equal share of the cores.

    `port` is that of the `rendezvous_store` at which the ranks meet; a job of one rank needs none.
    """
    # As under torchrun, rank 0 does not host the store; torch 2.11 reads the count as well.
    agent = {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RESTART_COUNT": "0"} if port else {}
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
        **agent,
    }


def rendezvous_store() -> dist.TCPStore:
    """The store at which the ranks of a job on this host meet; keep it until they have ended.

    It listens already, on a port that the kernel chose (`store.port`), so no other program can take that port.
    """
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def reserve_port() -> socket.socket:
    """A port of 127.0.0.1 (`.getsockname()[1]`) that nobody else is given while the returned socket is open.

    The socket never listens, so a server that sets SO_REUSEADDR (asyncio's, uvicorn's) can take the port meanwhile.
    """
    holder = socket.socket()
    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    holder.bind(("127.0.0.1", 0))
    return holder


def launch(
    command: Sequence[str],
    world: int,
    timeout_s: float | None = None,
    grace_s: float = 30.0,
    agreed: Sequence[int] = AGREED,
) -> int:
    """Run `command` once per rank; returns 0 when all succeed, else the exit code of the job's first fault.

    A rank that a signal ended counts as 128 + its number, as in a shell. When one fails, the others get ENDS_S to end
    by themselves (`grace_s` where they are about to: the codes `agreed`) and are killed. A failure that is none of
    `agreed` is the last line on stderr. SIGTERM, SIGINT and, unless it is ignored, SIGHUP are passed on to all ranks.
    Past `timeout_s` all are killed and the code is 124. Each rank writes to this process's own output. Should this
    process be killed, the kernel ends its ranks.
    """
    ranks: Ranks = []

    def pass_on(number: int, frame: object) -> None:
        for rank in ranks:
            if rank.poll() is None:
                rank.send_signal(number)
        if number == signal.SIGHUP:
            outlive_the_terminal()

    previous = {number: signal.signal(number, pass_on) for number in (*stop_signals(), signal.SIGINT)}
    try:
        store = rendezvous_store()
        for rank in range(world):
            environment = rank_environment(rank, world, store.port)
            ranks.append(subprocess.Popen(list(command), env=environment, preexec_fn=_end_with_parent))
        fault = _wait(ranks, timeout_s)
        if fault is None:
            return 0
        if fault.code in (*agreed, INTERRUPTED):
            _end(ranks, grace_s)
            return fault.code
        fault = FaultRecord(store).claim(fault)
        _end(ranks, ENDS_S)
        print(f"rank {fault.rank} {fault.what}; ended the others", file=sys.stderr, flush=True)
        return fault.code
    except TimeoutError as error:
        print(error, file=sys.stderr)
        return 124
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


def _wait(ranks: Ranks, timeout_s: float | None) -> Fault | None:
    """Wait until a rank has failed, and return how, or until all have succeeded (None). Raises TimeoutError."""
    deadline = time.monotonic() + timeout_s if timeout_s else float("inf")
    while True:
        codes = [rank.poll() for rank in ranks]
        for rank, code in enumerate(codes):
            if code:
                return Fault(rank, code if code > 0 else 128 - code, _how(code))
        if None not in codes:
            return None
        if time.monotonic() > deadline:
            raise TimeoutError(f"the job ran past its {timeout_s:g} s; ending all ranks")
        time.sleep(0.02)


def _how(code: int) -> str:
    """How a rank ended, from its return code as subprocess gives it: "rank N ..."."""
    if code > 0:
        return f"failed with exit code {code}"
    names = {number.value: number.name for number in signal.Signals} | {9: "SIGKILL; out of memory?"}
    return f"was killed by signal {-code} ({names.get(-code, 'unnamed')})"


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
