"""Text of models and numbers of runs, made fit for a page. What is special in HTML the template itself escapes."""

from __future__ import annotations

import math
import re
from typing import Any

# Without line feed and tab: control characters, those that turn the direction of writing or show as nothing, lone
# halves of surrogate pairs, and what is no character.
INVISIBLE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ud800-\udfff"
    "\ufff9-\ufffb\ufffe\uffff\U000e0000-\U000e007f]"
)


def visible(text: str) -> str:
    """`text` with every character that cannot be seen, or not be encoded, as Python writes it: \\x1b."""
    return INVISIBLE.sub(lambda found: _shown(ord(found[0])), text)


def cut(text: str, most: int) -> tuple[str, int]:
    """The first characters of a text, at most `most`, and how many are left out."""
    return text[:most], max(len(text) - most, 0)


def number(value: Any) -> str:
    """Six digits, enough to find the value in the files."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return "–" if value is None else str(value)
    if isinstance(value, int):
        return str(value) if abs(value) < 10**15 else "beyond all bounds"
    return f"{value:.6g}" if math.isfinite(value) else "–"


def _shown(code: int) -> str:
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
