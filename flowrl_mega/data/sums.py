"""The built-in task with many right answers: "12:" -> "5+7", "0+12", ... (any `terms` numbers that make 12).

A number is a non-negative integer without leading zeros. All right answers of a prompt can be listed, so pass rate,
distinct answers and coverage are computed exactly instead of sampled. The scorer is `flowrl_mega.rewards.sums:score`.
"""

from __future__ import annotations

from typing import Any

from flowrl_mega.config import ConfigError

ALPHABET = "0123456789+:"


def rows(lo: int = 0, hi: int = 99, terms: int = 2) -> list[dict[str, Any]]:
    """{"prompt": "07:", "total": 7, "terms": 2, "right_answers": ["0+7", ...]} for each total in lo..hi, both ends."""
    if not 0 <= lo <= hi <= 99:
        raise ConfigError(f"sums: the totals {lo}..{hi} must lie within 0..99, the lower one first")
    if terms < 2:
        raise ConfigError(f"sums: terms={terms} must be at least 2")
    return [
        {"prompt": f"{total:02d}:", "total": total, "terms": terms, "right_answers": right_answers(total, terms)}
        for total in range(lo, hi + 1)
    ]


def right_answers(n: int, terms: int = 2) -> list[str]:
    """Every right answer for the total n, each once: C(n + terms - 1, terms - 1) strings."""
    if terms == 1:
        return [str(n)]
    return [f"{first}+{rest}" for first in range(n + 1) for rest in right_answers(n - first, terms - 1)]
