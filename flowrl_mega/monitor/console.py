"""Progress on the console: a bar on a terminal, now and then a plain line where the output goes to a file."""

from __future__ import annotations

import sys
import time
from collections.abc import Mapping
from typing import Any, TextIO

from tqdm import tqdm

SHOWN = {
    "reward/mean": "reward {:.3f}",
    "perf/tokens_per_second": "{:,.0f} tok/s",
    "perf/memory_gb": "{:.2f} GB",
}


class Console:
    """Step, time left and the metrics of SHOWN.

    A bar on a terminal; elsewhere a line for the first step, for the last, and every `every` seconds between them.
    """

    def __init__(
        self, total_steps: int, resume_step: int = 0, stream: TextIO | None = None, every: float = 15.0
    ) -> None:
        self.total, self.first, self.every = total_steps, resume_step, every
        self.stream = stream or sys.stderr
        self._start = time.monotonic()
        self._last_line = float("-inf")
        self._bar: Any = None
        if self.stream.isatty():
            self._bar = tqdm(
                total=total_steps, initial=resume_step, desc="step", unit="step", dynamic_ncols=True, file=self.stream
            )

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        if self._bar is not None:
            self._bar.set_postfix_str(_summary(metrics), refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if now - self._last_line >= self.every or step == self.total:
            self._last_line = now
            self._write(f"step {step}/{self.total}, {self._left(step, now)} left, {_summary(metrics)}".rstrip(", "))

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        numbers = [f"{name} {value:.4g}" for name, value in metrics.items() if isinstance(value, (int, float))]
        self._write(f"evaluation after step {step}: {', '.join(numbers)}")

    def distributions(self, step: int, record: Mapping[str, Any]) -> None:
        """Nothing for a line."""

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()

    def _left(self, step: int, now: float) -> str:
        """Time left at the mean pace since this process started (earlier steps of a resumed run do not count)."""
        seconds = (now - self._start) / max(step - self.first, 1) * (self.total - step)
        return tqdm.format_interval(seconds)

    def _write(self, line: str) -> None:
        if self._bar is not None:
            self._bar.write(line, file=self.stream)
        else:
            print(line, file=self.stream, flush=True)


def _summary(metrics: Mapping[str, Any]) -> str:
    return ", ".join(form.format(float(metrics[name])) for name, form in SHOWN.items() if name in metrics)
