"""A limit on the CPU time of a piece of code, so that what else the machine is doing does not decide a verdict."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from math_verify.errors import TimeoutException

WALL = 60  # times the limit: for what sleeps; on a machine with 17 jobs a core a process was seen to get 2% of one
AGAIN_S = 1.0  # a library may swallow the exception: it comes again after this much more

TIMERS = [(signal.ITIMER_PROF, signal.SIGPROF, 1, time.process_time)]
TIMERS += [(signal.ITIMER_REAL, signal.SIGALRM, WALL, time.monotonic)]


@contextmanager
def cpu_limit(seconds: float) -> Iterator[None]:
    """Raise TimeoutException in the block after `seconds` of this process's CPU time, or 60 times as long by the clock.

    Only in the main thread. It may stand inside another one, or inside any use of the same timers: the shorter limit
    counts, and the outer timer goes on from where it would be.
    """
    over = False

    def ring(*_: Any) -> None:
        if not over:
            raise TimeoutException("Operation timed out!")

    outer = []
    for timer, number, times, clock in TIMERS:
        handler = signal.signal(number, ring)
        left, interval = signal.setitimer(timer, 0)
        outer.append((timer, number, handler, left, interval, clock, clock()))
        signal.setitimer(timer, min(seconds * times, left or seconds * times), AGAIN_S)
    try:
        yield
    finally:
        over = True
        for timer, number, handler, left, interval, clock, start in outer:
            signal.setitimer(timer, 0)
            signal.signal(number, handler)
            if left:
                signal.setitimer(timer, max(left - (clock() - start), 1e-3), interval)
