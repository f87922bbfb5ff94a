"""Rewards from reasoning-gym's own scorers, for rows made by `flowrl_mega.data.prepare.reasoning_gym.make_rows`.

In a YAML: `reward: flowrl_mega.rewards.reasoning_gym:score`. The scorers run in this process, and a few of them (e.g.
countdown, binary_matrix) evaluate the answer as an expression: for those train inside a sandbox.
"""

import functools
import re
from collections.abc import Callable
from typing import Any

from flowrl_mega.config import ConfigError

try:
    from reasoning_gym import get_score_answer_fn
    from reasoning_gym.utils import extract_answer
except ImportError as error:  # here, not in score(): the settings' check imports this module before any rank starts
    raise ConfigError("reasoning-gym is not installed; fix: pip install flowrl-mega[example]") from error

NUMBER = re.compile(r"[-+]?\d[\d,]*(?:\.\d+)?")


def score(row: dict[str, Any], response: str) -> tuple[float, str]:
    """(reward in [0, 1], why): the library's score of the answer that `extract` finds in `response` (decoded text).

    A number is right or wrong: the library gives part of the reward where the right answer's digits occur in a wrong
    number (112 for 12), which is meant for words around an answer and would teach a policy to write long numbers.
    """
    answer, source = extract(response, row["answer"])
    if answer is None:
        return 0.0, "no answer found"
    reward = float(_scorer(row["task"])(answer, row["entry"]))
    if reward < 1 and NUMBER.fullmatch(answer) and NUMBER.fullmatch(row["answer"] or ""):
        reward = 0.0
    return reward, f"{source} {answer[:80]!r}, right: {str(row['answer'])[:80]!r}"


score.right_at = 1.0  # type: ignore[attr-defined]  # the library gives 0.01 and more for wrong answers


def extract(response: str, right_answer: str | None) -> tuple[str | None, str]:
    """The answer inside a response and where it was found. The first that applies:

    1. the last `<answer>...</answer>`, the library's own format;
    2. the last number, when the right answer is a number ("3 + 4 = 7." gives 7; thousands separators are dropped);
    3. the whole response without white space around it.
    """
    tagged = extract_answer(response)
    if tagged is not None:
        return tagged, "tag"
    if right_answer is not None and NUMBER.fullmatch(right_answer):
        numbers = NUMBER.findall(response)
        return (numbers[-1].replace(",", ""), "number") if numbers else (None, "number")
    return response.strip() or None, "text"


@functools.cache
def _scorer(task: str) -> Callable[[str, dict[str, Any]], float]:
    """The library's scorer of `task`, built once: some tasks load a word list for it."""
    return get_score_answer_fn(task)
