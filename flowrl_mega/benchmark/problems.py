"""A benchmark's problems, once they are read."""

from __future__ import annotations

from typing import NamedTuple

from flowrl_mega.data.prompts import Row


class Problems(NamedTuple):
    """A benchmark's problems: `rows[i]` is problem i, with its prompt and what grades its answers."""

    name: str
    title: str
    rows: list[Row]
    source: str  # where they were read
    sum: str  # of all of the source's problems, also where only the first few are taken
    is_known: bool  # whether that is the known sum of this benchmark
