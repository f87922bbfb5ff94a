"""How far long work is: what is done, its pace and the time left."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from flowrl_mega.parallel.layout import rank, world

LINE_EVERY_S = 15.0


class Progress:
    """A bar on a terminal; elsewhere a line now and then. Of several ranks only the first shows its own share."""

    def __init__(
        self, label: str, total: int, stream: TextIO | None = None, every: float = LINE_EVERY_S, unit: str = "B"
    ) -> None:
        self.label, self.total, self.stream, self.every, self.unit = label, total, stream or sys.stderr, every, unit
        self.done, self.start = 0, time.monotonic()
        self._last_line = self.start
        self._bar: Any = None
        if self.stream.isatty():
            scale = unit == "B"
            self._bar = tqdm(total=total, desc=label, unit=unit, unit_scale=scale, dynamic_ncols=True, file=self.stream)

    def __call__(self, size: int) -> None:
        self.done += size
        if self._bar is not None:
            self._bar.update(size)
            return
        now = time.monotonic()
        if now - self._last_line >= self.every:
            self._last_line = now
            pace = self.done / (now - self.start)
            left = tqdm.format_interval((self.total - self.done) / pace)
            sizes = f"{self._amount(self.done)} of {self._amount(self.total)}"
            print(f"{self.label}: {sizes}, {self._amount(pace)}/s, {left} left", file=self.stream, flush=True)

    def _amount(self, value: float) -> str:
        """Bytes as 1.23MB; what is counted as it is."""
        if self.unit == "B":
            return f"{tqdm.format_sizeof(value)}{self.unit}"
        return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


@contextmanager
def progress(label: str, total: int, show: bool) -> Iterator[Callable[[int], None]]:
    """Callback that receives the number of bytes done; rank 0 displays them, where `show`."""
    if not show or rank():
        yield lambda size: None
        return
    bar = Progress(label if world() == 1 else f"{label}, rank 0 of {world()}", total)
    try:
        yield bar
    finally:
        bar.close()
