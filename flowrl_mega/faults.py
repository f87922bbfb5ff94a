"""The first fault of a job: told once, by the rank that met it, and every rank ends with its exit code.

A rank that fails cannot say so in a collective, because the others are in another one. It records its fault in the
job's TCPStore instead, and the first record wins. All ranks watch the record: one whose collective breaks when its peer
leaves, and one that would wait for the peer for ever, learn there that the fault is not theirs and end quietly.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import datetime, timedelta
from pathlib import Path

import torch.distributed as dist

from flowrl_mega import run_lock
from flowrl_mega.config import ConfigError, RunError

BAD_INPUT, CANNOT_GO_ON, INTERRUPTED, CRASHED = 2, 70, 130, 1
POLL_S = 0.25  # between two looks at the record
PATIENCE_S = 3.0  # for another rank's record, when a collective has failed here
GRACE_S = 3.0  # for a rank to clean up after another's fault, before it is ended
LINGER_S = 10.0  # rank 0, where it hosts the store, waits at most so long for the others to leave
FOLDER = "faults"  # in the run folder: rank_N.log
# What gloo, NCCL and the store say when a peer is gone or silent.
LOST_PEER = re.compile(r"gloo|nccl|connection (was )?(closed|reset|refused)|broken pipe|socket (closed|timeout)", re.I)


@dataclass(frozen=True)
class Fault:
    """Why a job ends. `what` goes on from "rank N", as in "failed: ValueError: ..."."""

    rank: int
    code: int
    what: str


class FaultRecord:
    """The job's first fault, in its TCPStore. Methods raise torch's DistError where the store's host is gone."""

    def __init__(self, store: dist.Store) -> None:
        self.store = dist.PrefixStore(f"faults_{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", store)

    def read(self) -> Fault | None:
        """The recorded fault, if any; does not wait."""
        return Fault(**json.loads(self.store.get("first"))) if self.store.check(["first"]) else None

    def claim(self, fault: Fault) -> Fault:
        """Record `fault` unless one is recorded already; returns the recorded one."""
        return Fault(**json.loads(self.store.compare_set("first", "", json.dumps(asdict(fault)))))


def run_as_rank(run: Callable[[], int], run_dir: Path) -> int:
    """Run one rank of a job that a launcher started; returns the exit code: `run`'s, or that of the job's first fault.

    Reads torchrun's environment. The rank that met the first fault prints it: a ConfigError (code 2) or RunError (70)
    as one message, any other exception (1) as its traceback. Tracebacks are kept in `run_dir`/faults/rank_N.log, and
    those of ranks that failed because another one left go only there.
    """
    if int(os.environ["WORLD_SIZE"]) == 1:
        return run()
    member = _Member(run_dir / FOLDER)
    try:
        code = run()
    except BaseException as error:
        code = member.fail(error)
    member.leave()
    return code


class _Member:
    """This rank's share in the record: watches it, writes to it, and leaves the job."""

    def __init__(self, folder: Path) -> None:
        self.rank, self.world, self.folder = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]), folder
        self.hosts = self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
        self.record = FaultRecord(_store(self.hosts))
        self.done = threading.Event()
        self.watch = threading.Thread(target=self._watch, name="faults", daemon=True)
        self.watch.start()

    def fail(self, error: BaseException) -> int:
        """Record `error`, or find that another rank's fault came first; prints or logs it; returns the exit code."""
        for number in (signal.SIGTERM, signal.SIGHUP):  # torchrun's to the others: this one ends with the fault's code
            signal.signal(number, signal.SIG_IGN)
        self._end_watch()
        mine, first = self._fault(error), None
        lost_peer = _lost_peer(error)
        with suppress(dist.DistError):
            first = (self._wait() if lost_peer else None) or self.record.claim(mine)
        known = isinstance(error, ConfigError | RunError | KeyboardInterrupt)
        log = None if known else self._log(error)
        if first is None and lost_peer:
            _print(f"flowrl-mega: rank {self.rank} lost rank 0; its own traceback: {log}")
        elif first is None or first == mine:
            if isinstance(error, ConfigError | RunError):
                _print(f"flowrl-mega: {error}")
            elif lost_peer and log:
                _print(
                    f"flowrl-mega: rank {self.rank} lost another rank, which has not said why (killed, or silent for "
                    f"longer than parallel.timeout_s): {_last_line(error)}; traceback: {log}"
                )
            elif not isinstance(error, KeyboardInterrupt):
                _print(f"flowrl-mega: rank {self.rank} failed:\n{_traceback(error)}")
        return first.code if first else mine.code

    def leave(self) -> None:
        """Rank 0 stays until the others have left, where it hosts the store that they look into."""
        self._end_watch()
        with suppress(dist.DistError):
            left, end = self.record.store.add("left", 1), time.monotonic() + LINGER_S
            while self.hosts and left < self.world and time.monotonic() < end:
                time.sleep(0.02)
                left = self.record.store.add("left", 0)

    def _watch(self) -> None:
        """End this process some time after another rank's fault, should it not end by itself."""
        with suppress(dist.DistError):  # the host is gone
            while not self.done.wait(POLL_S):
                if fault := self.record.read():
                    if not self.done.wait(GRACE_S):
                        self.record.store.add("left", 1)
                        run_lock.release_all()
                        sys.stdout.flush()
                        sys.stderr.flush()
                        os._exit(fault.code)
                    return

    def _end_watch(self) -> None:
        self.done.set()
        self.watch.join()

    def _wait(self) -> Fault | None:
        """The fault that another rank records within PATIENCE_S."""
        end = time.monotonic() + PATIENCE_S
        while (fault := self.record.read()) is None and time.monotonic() < end:
            time.sleep(0.02)
        return fault

    def _fault(self, error: BaseException) -> Fault:
        codes = {ConfigError: BAD_INPUT, RunError: CANNOT_GO_ON, KeyboardInterrupt: INTERRUPTED}
        code = next((code for kind, code in codes.items() if isinstance(error, kind)), CRASHED)
        return Fault(self.rank, code, f"failed: {_last_line(error)}")

    def _log(self, error: BaseException) -> Path | None:
        """Append the traceback to this rank's log; its path, or None where it cannot be written."""
        path = self.folder / f"rank_{self.rank}.log"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with open(path, "a", encoding="utf-8") as file:
                file.write(f"{datetime.now().isoformat(timespec='seconds')} rank {self.rank}\n{_traceback(error)}\n")
        except OSError:
            return None
        return path


def _store(hosts: bool) -> dist.TCPStore:
    """The job's store, which is at MASTER_ADDR and MASTER_PORT, or will be."""
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    place = f"MASTER_ADDR = {address!r}, MASTER_PORT = {port}"
    try:
        return dist.TCPStore(
            address,
            port,
            is_master=hosts,
            timeout=timedelta(minutes=5),
            wait_for_workers=False,
            multi_tenant=True,  # the process group's store is the same server
        )
    except dist.DistError as error:
        if hosts:
            raise ConfigError(f"{place}: rank 0 cannot listen there ({_last_line(error)}); name another port") from None
        try:
            socket.getaddrinfo(address, port)
        except OSError as unknown:
            raise ConfigError(f"{place}: no such host ({unknown.strerror}); name that of rank 0") from None
        raise


def _lost_peer(error: BaseException | None) -> bool:
    """True where `error`, or what it came from, is a collective's that lost another rank."""
    while error:
        if isinstance(error, dist.DistError) or (isinstance(error, RuntimeError) and LOST_PEER.search(str(error))):
            return True
        error = error.__cause__ or error.__context__
    return False


def _last_line(error: BaseException) -> str:
    """As the traceback's last line; the first one of a message of several."""
    return traceback.format_exception_only(error)[-1].splitlines()[0]


def _traceback(error: BaseException) -> str:
    return "".join(traceback.format_exception(error)).rstrip()


def _print(text: str) -> None:
    """In one piece: ranks share the terminal."""
    sys.stderr.write(text + "\n")
    sys.stderr.flush()
