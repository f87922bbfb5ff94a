"""Grading math answers against row["answer"]: DAPO's rule (a match of strings) and math-verify (equality in sympy)."""

from __future__ import annotations

import threading
from functools import lru_cache
from typing import Any

from flowrl_mega.config import RewardSettings
from flowrl_mega.rewards import minerva
from flowrl_mega.rewards.equality import OUT_OF_ROOM, equal, read_gold
from flowrl_mega.rewards.final_answer import final_answer
from flowrl_mega.rewards.limits import cpu_limit

Verdict = tuple[float, str, str]


def dapo(row: dict[str, Any], response: str) -> Verdict:
    """+1.0 if the response's last "Answer:" line is `row["answer"]` in Minerva's normal form, else -1.0; why; kind.

    The rule of verl's math_dapo.py, literally: 27.0 is not 27. One difference: an integer's leading zeros do not count,
    033 is 33. See `minerva.extract` for where it looks. (Only the text "[INVALID]", verl's mark of a missing answer, is
    no special one here.) Raises ValueError without an answer.
    """
    answer = _answer(row)
    found = minerva.extract(response)
    if found is None:
        return -1.0, f"no 'Answer:' in the last {minerva.TAIL} characters", "no answer"
    text, is_line = found
    given, right = (minerva.normalise(text), _normal_gold(answer)) if is_line else (text, answer)
    return _verdict(minerva.same(given, right), given, right, wrong=-1.0)


dapo.wrong = -1.0  # type: ignore[attr-defined]  # what a failed call scores
dapo.right_at = 1.0  # type: ignore[attr-defined]
dapo.is_quick = True  # type: ignore[attr-defined]  # some 20 microseconds


DEFAULT = RewardSettings(function="flowrl_mega.rewards.math:verify")


def verify(row: dict[str, Any], response: str, settings: RewardSettings = DEFAULT) -> Verdict:
    """1.0 if the response's final answer equals `row["answer"]` mathematically (by math-verify), else 0.0; why; kind.

    Answers in words are compared as words; docs/rewards.md has the table of what is equal. Reading and comparing may
    take `reward.math.timeout_s` seconds of this process's CPU time; more is wrong, kind "time-out", like a number with
    too many digits to compute. Raises ValueError if `row["answer"]` cannot be parsed (`check_gold`), RuntimeError
    outside the main thread, where the signals that end it in time do not arrive.
    """
    if threading.current_thread() is not threading.main_thread():
        raise RuntimeError("math:verify must run in the main thread of a process: its time-outs are signals")
    answer, seconds = _answer(row), settings.math.timeout_s
    try:
        golds = read_gold(answer, seconds)
    except ValueError as error:
        raise ValueError(f"row {row.get('id')!r}: answer {answer!r:.200}: {error}; correct or drop the row") from None
    given = final_answer(response)
    if given is None:
        return 0.0, "no \\boxed{} and no 'Answer:'", "no answer"
    try:
        with cpu_limit(seconds):
            right = any(equal(gold, given) for gold in golds)
    except OUT_OF_ROOM as error:
        return 0.0, f"{_short(given)}: too hard to compare ({type(error).__name__})", "time-out"
    return _verdict(right, given, answer, wrong=0.0)


verify.right_at = 1.0  # type: ignore[attr-defined]


def check_gold(answer: str, seconds: int = 5) -> str | None:
    """Why `verify` could not compare anything with this gold answer, or None if it can."""
    try:
        read_gold(answer, seconds)
    except ValueError as error:
        return str(error)
    return None


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
