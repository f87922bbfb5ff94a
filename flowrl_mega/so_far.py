"""A line now and then from work whose end is not known: how long it has taken so far."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TextIO

EVERY_S = 15.0


@contextmanager
def so_far(
    label: str, show: bool = True, count: Callable[[], str] | None = None, stream: TextIO | None = None
) -> Iterator[None]:
    """Around the work. The first line comes after EVERY_S seconds: what is quick says nothing. `count` says how much is
    done; it is called from another thread."""
    if not show:
        yield
        return
    ended, began = threading.Event(), time.monotonic()

    def tell() -> None:
        while not ended.wait(EVERY_S):
            done = f", {count()}" if count else ""
            line = f"flowrl-mega: {label}: {time.monotonic() - began:.0f} s so far{done}"
            print(line, file=stream or sys.stderr, flush=True)

    teller = threading.Thread(target=tell, daemon=True)
    teller.start()
    try:
        yield
    finally:
        ended.set()
        teller.join()
