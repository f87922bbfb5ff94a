"""Tables of Markdown, and pages whose words are written by hand around them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path


def line(cells: Sequence[str]) -> str:
    """A row of a table; what would end a cell is escaped."""
    escaped = (cell.replace("|", "\\|") for cell in cells)
    return f"| {' | '.join(escaped)} |"


def rule(columns: int) -> str:
    """What stands under a table's head."""
    return line(["---"] * columns)


def put_between(page: Path, begin: str, end: str, text: str) -> None:
    """Replace what stands between two marks of a page."""
    before, mark, rest = page.read_text().partition(begin)
    _, last, after = rest.partition(end)
    assert mark and last, f"{page} has lost its marks: {begin} ... {end}"
    page.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
