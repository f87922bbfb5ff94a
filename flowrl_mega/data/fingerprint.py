"""Identifies a tokenizer by what it does: a name can mean other ids in another version of a library."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from typing import Any

# Normalisation, digits, spaces, line ends, scripts, a character of four bytes: where tokenizers differ.
PROBE = (
    "The quick brown fox jumps over the lazy dog, and then thirteen others think about something else.",
    "Hello, world! It's 12345.678 + x_1 = \\frac{1}{2}",
    "def f(a):\n    return a  # tab:\t\n\n",
    "É e\u0301 ﬁ Ⅳ ½",
    "日本語 русский العربية 🙂",
    "  two  spaces  ",
    "012:",
)


@dataclass(frozen=True)
class Fingerprint:
    """`vocabulary` and `probe` decide; the name is for messages, `template` is compared where it was applied."""

    name: str
    size: int  # highest id + 1
    vocabulary: str  # SHA-256 of the tokens by id
    probe: str  # SHA-256 of the ids of PROBE
    template: str | None = None  # SHA-256 of the chat template

    @classmethod
    def of(cls, tokenizer: Any) -> Fingerprint:
        tokens = sorted((index, token) for token, index in tokenizer.get_vocab().items())
        template = tokenizer.chat_template
        return cls(
            name=str(tokenizer.name_or_path or type(tokenizer).__name__),
            size=tokens[-1][0] + 1,
            vocabulary=_hash(tokens),
            probe=_hash([_ids(tokenizer, text) for text in PROBE]),
            template=_hash(template) if template else None,
        )

    def as_json(self) -> dict[str, Any]:
        return asdict(self)


def _ids(tokenizer: Any, text: str) -> list[int] | None:
    """None where the tokenizer has no token for a character: tokenizers then raises a bare Exception."""
    try:
        return tokenizer(text)["input_ids"]
    except Exception:
        return None


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
