"""The built-in task with many right answers: "12:" -> "5+7", "0+12", ... (any `terms` numbers that make 12).

A number is a non-negative integer without leading zeros. All right answers of a prompt can be listed, so pass rate,
distinct answers and coverage are computed exactly instead of sampled. The scorer is `flowrl_mega.rewards.sums:score`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from flowrl_mega.config import ConfigError

ALPHABET = "0123456789+:"


@dataclass(frozen=True)
class Sums:
    """The task `data.task: sums`: the totals lo..hi, both included. ConfigError for totals outside 0..99.

    repeat: times that every character of an answer is written ("55++77" with 2): the same answers, longer.
    """

    lo: int = 0
    hi: int = 99
    terms: int = 2
    repeat: int = 1

    def __post_init__(self) -> None:
        if not 0 <= self.lo <= self.hi <= 99:
            raise ConfigError(f"sums: the totals {self.lo}..{self.hi} must lie within 0..99, the lower one first")
        if self.terms < 2:
            raise ConfigError(f"sums: terms={self.terms} must be at least 2")
        if self.repeat < 1:
            raise ConfigError(f"sums: repeat={self.repeat} must be at least 1")

    def rows(self) -> list[dict[str, Any]]:
        """One row per total: {"prompt": "07:", "total": 7, "terms": 2, "right_answers": ["0+7", ...]}, and "repeat"
        where that is not 1."""
        longer = {"repeat": self.repeat} if self.repeat > 1 else {}
        return [
            {
                "prompt": f"{total:02d}:",
                "total": total,
                "terms": self.terms,
                "right_answers": right_answers(total, self.terms, self.repeat),
                **longer,
            }
            for total in range(self.lo, self.hi + 1)
        ]


def right_answers(n: int, terms: int = 2, repeat: int = 1) -> list[str]:
    """Every right answer for the total n, each once: C(n + terms - 1, terms - 1) strings."""
    if terms == 1:
        return [_written(n, repeat)]
    return [
        f"{_written(first, repeat)}{'+' * repeat}{rest}"
        for first in range(n + 1)
        for rest in right_answers(n - first, terms - 1, repeat)
    ]


def _written(number: int, repeat: int) -> str:
    return "".join(digit * repeat for digit in str(number))
