"""Scorer of the built-in sums task (`flowrl_mega.data.sums`)."""

from __future__ import annotations

import re
from typing import Any

# Totals are at most 99, so a longer number is never part of a right answer.
NUMBER = "(?:0|[1-9][0-9]?)"


def score(row: dict[str, Any], response: str) -> tuple[float, str]:
    """1.0 if `response` is `row["terms"]` numbers joined by "+" whose sum is `row["total"]`, else 0.0; and why.

    Numbers are 0..99 without leading zeros; anything before or after them makes the answer wrong. Where `row["repeat"]`
    is more than 1, every character must be written so many times.
    """
    terms, total, repeat = row["terms"], row["total"], row.get("repeat", 1)
    written, response = response, response[::repeat]
    if written != "".join(character * repeat for character in response):
        return 0.0, f"not every character {repeat} times"
    if not re.fullmatch(rf"{NUMBER}(?:\+{NUMBER}){{{terms - 1}}}", response):
        return 0.0, f"not {terms} numbers joined by '+'"
    value = sum(map(int, response.split("+")))
    return (1.0, "right") if value == total else (0.0, f"makes {value}, not {total}")


score.right_at = 1.0  # type: ignore[attr-defined]
score.is_quick = True  # type: ignore[attr-defined]
