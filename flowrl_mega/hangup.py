"""SIGHUP, which a closed terminal sends: a wish to save and stop, as SIGTERM is, with nobody left to read."""

from __future__ import annotations

import os
import select
import signal
import threading

OUTPUTS = (1, 2)


def stop_signals() -> tuple[signal.Signals, ...]:
    """What asks for a stop: SIGTERM, and SIGHUP unless it is ignored from the start, as under nohup."""
    hangs_up = signal.getsignal(signal.SIGHUP) != signal.SIG_IGN
    return (signal.SIGTERM, signal.SIGHUP) if hangs_up else (signal.SIGTERM,)


def outlive_the_terminal() -> None:
    """From now on what is written to stdout or stderr goes nowhere as soon as nobody can read it: a line about the last
    step must not end the run before its checkpoint. A pipe's reader (`| tee log`) may die a little later than we are
    told."""
    for output in OUTPUTS:
        if not _silence(output, wait_ms=0):
            threading.Thread(target=_silence, args=(output,), name="hangup", daemon=True).start()


def _silence(output: int, wait_ms: int | None = None) -> bool:
    """Once the output has lost its reader, nothing is in its place; True then. Files never do."""
    poll = select.poll()
    poll.register(output, 0)
    if not poll.poll(wait_ms):
        return False
    nothing = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nothing, output)
    os.close(nothing)
    return True
