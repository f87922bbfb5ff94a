"""Grading math answers against row["answer"]: DAPO's rule (a match of strings) and math-verify (equality in sympy)."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import math_verify
from latex2sympy2_extended import NormalizationConfig
from math_verify.errors import TimeoutException

from flowrl_mega.config import RewardSettings
from flowrl_mega.rewards import minerva
from flowrl_mega.rewards.final_answer import balanced, final_answer, tidy, words

Verdict = tuple[float, str, str]

LONGEST = 1000  # characters of an answer; the time of math-verify's parser grows with them
OUT_OF_ROOM = (TimeoutException, RecursionError, MemoryError)

# Units are removed by `tidy`, and only what stands in a box is read: see `final_answer`.
LATEX = math_verify.LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)


def dapo(row: dict[str, Any], response: str) -> Verdict:
    """+1.0 if the response's last "Answer:" line is `row["answer"]` in Minerva's normal form, else -1.0; why; kind.

    The rule of verl's math_dapo.py, literally: 27.0 is not 27. See `minerva.extract` for where it looks. (Only the
    text "[INVALID]", verl's mark of a missing answer, is no special one here.) Raises ValueError without an answer.
    """
    answer = _answer(row)
    found = minerva.extract(response)
    if found is None:
        return -1.0, f"no 'Answer:' in the last {minerva.TAIL} characters", "no answer"
    text, is_line = found
    given, right = (minerva.normalise(text), _normal_gold(answer)) if is_line else (text, answer)
    return _verdict(given == right, given, right, wrong=-1.0)


dapo.wrong = -1.0  # type: ignore[attr-defined]  # what a failed call scores
dapo.right_at = 1.0  # type: ignore[attr-defined]
dapo.is_quick = True  # type: ignore[attr-defined]  # some 20 microseconds


DEFAULT = RewardSettings(function="flowrl_mega.rewards.math:verify")


def verify(row: dict[str, Any], response: str, settings: RewardSettings = DEFAULT) -> Verdict:
    """1.0 if the response's final answer equals `row["answer"]` mathematically (by math-verify), else 0.0; why; kind.

    Answers in words are compared as words. Parsing and comparing may take `reward.math.timeout_s` seconds each; more
    is wrong, kind "time-out". Raises ValueError if `row["answer"]` cannot be parsed (`check_gold`), RuntimeError
    outside the main thread, where the signals that end math-verify in time do not arrive.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math:verify must run in the main thread of a process: its time-outs are signals")
    answer, seconds = _answer(row), settings.math.timeout_s
    try:
        gold = _gold(answer, seconds)
    except ValueError as error:
        raise ValueError(f"row {row.get('id')!r}: answer {answer!r:.200}: {error}; correct or drop the row") from None
    given = final_answer(response)
    if given is None:
        return 0.0, "no \\boxed{} and no 'Answer:'", "no answer"
    try:
        return _verdict(_equal(gold, given, seconds), given, answer, wrong=0.0)
    except OUT_OF_ROOM as error:
        return 0.0, f"{_short(given)}: too hard to compare ({type(error).__name__})", "time-out"


verify.right_at = 1.0  # type: ignore[attr-defined]


def check_gold(answer: str, seconds: int = 5) -> str | None:
    """Why `verify` could not compare anything with this gold answer, or None if it can."""
    try:
        _gold(answer, seconds)
    except ValueError as error:
        return str(error)
    return None


@dataclass(frozen=True)
class Gold:
    """A gold answer: its text; its words if it is in words, else what math-verify reads (an expression, its string)."""

    text: str
    words: str | None
    parsed: tuple[Any, ...]


@lru_cache(maxsize=1 << 16)
def _gold(answer: str, seconds: int) -> Gold:
    """Raises ValueError that says why the answer cannot be compared with."""
    if not answer.strip():
        raise ValueError("is empty")
    if len(answer) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    text = words(answer)
    # Two letters without \text are a product of variables.
    if text is not None and ("\\text" in answer or "\\mbox" in answer or max(map(len, text.split())) > 2):
        return Gold(tidy(answer), text, ())
    try:
        parsed = _parse(answer, seconds)
    except OUT_OF_ROOM:
        raise ValueError(f"math-verify does not parse it within {seconds} s") from None
    if not parsed:
        raise ValueError("math-verify cannot parse it" + ("" if balanced(answer) else ", its braces do not match"))
    return Gold(tidy(answer), None, parsed)


def _equal(gold: Gold, given: str, seconds: int) -> bool:
    if len(given) > LONGEST:
        return False
    if tidy(given) == gold.text:  # most right answers are: parsing takes milliseconds
        return True
    if gold.words is not None:
        return words(given) == gold.words
    # Strings, which are last, first: comparing them costs no algebra.
    return any(_same(a, b, seconds) for b in reversed(_parse(given, seconds)) for a in reversed(gold.parsed))


def _parse(answer: str, seconds: int) -> tuple[Any, ...]:
    """What math-verify reads in one answer: an expression and its string, the string alone, or nothing."""
    text = tidy(answer)
    if not balanced(text):
        return ()
    try:
        return tuple(math_verify.parse(f"\\boxed{{{text}}}", [LATEX], parsing_timeout=seconds, raise_on_error=True))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # not one of its documented ones: the text comes from a model, and anything may break in a parser
        return ()


def _same(gold: Any, given: Any, seconds: int) -> bool:
    try:
        return math_verify.verify(gold, given, timeout_seconds=seconds, raise_on_error=True)
    except (RecursionError, MemoryError):
        raise
    except Exception:  # sympy could not compare them, 1/0 with something for example
        return False


@lru_cache(maxsize=1 << 16)
def _normal_gold(answer: str) -> str:
    return minerva.normalise(answer)


def _answer(row: dict[str, Any]) -> str:
    answer = row.get("answer")
    if not isinstance(answer, str):
        raise ValueError(f"row {row.get('id')!r}: a math row needs 'answer', a string, and has {answer!r:.100}")
    return answer


def _verdict(right: bool, given: str, answer: str, wrong: float) -> Verdict:
    if right:
        return 1.0, f"right: {_short(given)}", "right"
    return wrong, f"{_short(given)}, not {_short(answer)}", "wrong"


def _short(text: str) -> str:
    text = " ".join(text[:1000].split())
    return text if len(text) <= 80 else text[:77] + "..."
