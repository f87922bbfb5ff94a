"""A recipe's result: the problem, its prompt and what its reward reads; and helpers that read a record's columns."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from decimal import Decimal
from typing import Any

from flowrl_mega.data.prompts import Row

BOXED = "{}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
# Of DAPO-Math-17k and its rule, to the letter.
ANSWER_BEFORE = (
    "Solve the following math problem step by step. The last line of your response should be of the form Answer: "
    "$Answer (without quotes) where $Answer is the answer to the problem.\n\n"
)
ANSWER_AFTER = '\n\nRemember to put your answer on its own line after "Answer:".'
FLOAT = re.compile(r"([+-]?\d+)\.0+")
BROKEN, EMPTY, BAD_ANSWER, BAD_TESTS = "broken", "empty", "bad answer", "bad tests"


class BadRow(ValueError):
    """A record that gives no prompt. `reason` is the class that it is counted under; the message says what is wrong."""

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(detail)
        self.reason = reason


@dataclass(frozen=True)
class Problem:
    """`text` is the problem alone, by which duplicates and contamination are found; `row` is what the store keeps."""

    text: str
    row: Row = field(default_factory=dict)
    image: bytes | str = b""  # encoded, or the path of a file


def math(text: str, answer: str, wording: str) -> Problem:
    """A problem with an answer. `wording` "boxed": graded by math-verify; "answer": by DAPO's rule."""
    if wording == "boxed":
        return Problem(text, {"prompt": BOXED.format(text), "kind": "math", "answer": answer})
    prompt = f"{ANSWER_BEFORE}{text}{ANSWER_AFTER}"
    return Problem(text, {"prompt": prompt, "kind": "math_dapo", "answer": answer})


def code(text: str, prompt: str, tests: dict[str, Any]) -> Problem:
    return Problem(text, {"prompt": prompt, "kind": "code", "tests": tests})


def column(record: dict[str, Any], *names: str) -> Any:
    """The value of the first of these columns that the record has. BadRow if it has none."""
    for name in names:
        if record.get(name) is not None:
            return record[name]
    if null := [name for name in names if name in record]:
        raise BadRow(EMPTY, f"{null[0]!r} is null; fill it in or remove the row")
    wanted = " or ".join(map(repr, names))
    have = ", ".join(map(repr, record))[:200] or "nothing"
    raise BadRow(BROKEN, f"has no {wanted} (it has: {have}); name the column with --columns")


def text_of(record: dict[str, Any], *names: str) -> str:
    """The text in the first of these columns that the record has, stripped. BadRow if it is not text, or empty."""
    value = column(record, *names)
    if not isinstance(value, str):
        raise BadRow(BROKEN, f"{' or '.join(map(repr, names))} is a {type(value).__name__}; must be text")
    if not value.strip():
        raise BadRow(EMPTY, f"{' or '.join(map(repr, names))} is empty; fill it in or remove the row")
    return value.strip()


def answer_of(record: dict[str, Any], *names: str) -> str:
    """The first of these columns as an answer: text, or a number, with 27.0 as 27. BadRow for anything else."""
    value = column(record, *names)
    if isinstance(value, bool) or not isinstance(value, (str, int, float, Decimal)):
        kind = type(value).__name__
        raise BadRow(BAD_ANSWER, f"{' or '.join(map(repr, names))} is a {kind}; must be text or a number")
    try:
        text = decimal(value) if isinstance(value, (float, Decimal)) else str(value).strip()
    except ValueError:  # an integer of more digits than Python prints
        raise BadRow(BAD_ANSWER, "the answer is a number too large to print; remove the row") from None
    if not text:
        raise BadRow(EMPTY, "the answer is empty; fill it in or remove the row")
    if text.lower().lstrip("+-") in ("nan", "inf", "infinity"):
        raise BadRow(BAD_ANSWER, f"the answer is {text}, no number; correct or remove the row")
    whole = FLOAT.fullmatch(text)
    return whole[1] if whole else text


def decimal(number: float | Decimal) -> str:
    """A number in plain decimals where that is short, so that every rule reads it as one: 1e16 has 17 digits."""
    text = str(number)
    value = Decimal(text)
    return format(value, "f") if value.is_finite() and abs(value.adjusted()) <= 20 else text


def last_boxed(solution: str) -> str:
    r"""The contents of the last \boxed{...} of a solution, with braces matched. BadRow if there is none."""
    start = solution.rfind("\\boxed{")
    depth = 0
    for end in range(start + 6, len(solution)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(solution[end], 0)
        if depth == 0:
            return solution[start + 7 : end].strip()
    raise BadRow(BAD_ANSWER, "the solution holds no whole \\boxed{...}; give an 'answer'")


def without_wording(prompt: str) -> str:
    """The problem in a prompt of `math`, or in DAPO's own."""
    prompt = prompt.strip().removeprefix(ANSWER_BEFORE.strip())
    return prompt.removesuffix(ANSWER_AFTER.strip()).removesuffix(BOXED.format("").strip()).strip()
