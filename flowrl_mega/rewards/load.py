"""Finding a reward function by name, and scoring a batch of responses without letting one bad answer end the run."""

from __future__ import annotations

import inspect
import math
import numbers
import traceback
from collections.abc import Callable, Sequence, Set
from dataclasses import dataclass
from functools import partial
from typing import Any

from flowrl_mega.config import ConfigError, RewardSettings
from flowrl_mega.imports import load_with_module
from flowrl_mega.settings import changed

Row = dict[str, Any]
Result = float | tuple[float, str] | tuple[float, str, str]


@dataclass(frozen=True)
class Score:
    """One response's reward and the reason for it; `failed` if the reward function itself did not work.

    `kind` is the reason in a word or two, to be counted: "right", "wrong", "time-out", ...
    """

    reward: float
    reason: str
    failed: bool
    kind: str = ""
    right: bool = False  # by the reward as the function gave it, before any penalty: see `Reward.is_right`


@dataclass(frozen=True)
class Reward:
    """A reward function with its settings bound, and what it says of itself."""

    function: Callable[[Row, str], Result]
    describe: Callable[..., str]  # of the kinds of rows[, modules of their tests]: what it works with; may refuse
    wrong: float | Callable[[Row], float]  # the reward of an answer for which the call failed; may depend on the row
    takes_settings: bool  # else it reads neither reward.math nor reward.code
    is_quick: bool  # takes microseconds: not worth a process of its own
    right_at: float | None = None  # the least reward of a right answer; None: any above 0

    def __call__(self, row: Row, response: str) -> Result:
        return self.function(row, response)

    def of_failed(self, row: Row) -> float:
        """The reward of an answer to the row for which the call failed."""
        return self.wrong(row) if callable(self.wrong) else self.wrong

    def is_right(self, reward: float) -> bool:
        """Whether an answer with this reward counts as right in pass@k and its like."""
        return reward > 0 if self.right_at is None else reward >= self.right_at


def load_reward(settings: RewardSettings) -> Reward:
    """The reward function that `settings.function` names, as "module:function" or "path/to/file.py:function".

    It takes (row, response) or (row, response, settings). Its attribute `wrong` is the reward of a failed call (0) or
    a function of the row that gives it, `is_quick` says that a call takes microseconds, `right_at` is the least reward
    of a right answer (any above 0). A function `describe(settings[, kinds[, modules]])` beside it says at the start
    what it works with, for rows of these kinds, whose tests import these modules.

    Raises ConfigError as `imports.load` does, and for what is no function or takes other arguments.
    """
    reward = bound(settings)
    if not reward.takes_settings:
        for name, value in changed(settings).items():
            if name.startswith(("math.", "code.")):
                raise ConfigError(
                    f"reward.{name} = {value!r}: {settings.function} takes (row, response) and reads no settings; "
                    "leave this out, or name a function that takes (row, response, settings)"
                )
    return reward


def bound(settings: RewardSettings) -> Reward:
    """As `load_reward`, also where the settings hold something that this function does not read, but others do."""
    spec = settings.function
    function, module = load_with_module(spec, "reward.function")
    if not callable(function):
        raise ConfigError(f"reward.function = {spec!r}: is {function!r:.100}, not a function")
    takes_settings = _takes(function, 3)
    if not takes_settings and not _takes(function, 2):
        raise ConfigError(
            f"reward.function = {spec!r}: must take (row, response) or (row, response, settings), but takes "
            f"{inspect.signature(function)}"
        )
    describe = partial(_describe, getattr(module, "describe", None), settings)
    wrong, is_quick = getattr(function, "wrong", 0.0), getattr(function, "is_quick", False)
    call_it = partial(_with_settings, function, settings) if takes_settings else function
    right_at = getattr(function, "right_at", None) if settings.right_at is None else settings.right_at
    return Reward(call_it, describe, wrong, takes_settings, is_quick, right_at)


def call(reward: Reward, row: Row, response: str) -> Score:
    """The response's score. A call that raises or returns no finite number scores as wrong and is `failed`."""
    try:
        result: Any = reward(row, response)
    except Exception as error:
        return Score(reward.of_failed(row), _last_line(error), failed=True, kind="error")
    value, *words = result if isinstance(result, tuple) and len(result) in (2, 3) else (result,)
    number = _number(value)
    if number is None:
        message = f"the reward returned {result!r:.100}, not a finite number"
        return Score(reward.of_failed(row), message, failed=True, kind="error")
    reason, kind = [*map(str, words), "", ""][:2]
    return Score(number, reason, failed=False, kind=kind, right=reward.is_right(number))


def refuse_all_failed(scores: Sequence[Score]) -> None:
    """Raises ConfigError if every call raised: a reward that never works must not train silently."""
    if scores and all(score.failed and score.kind == "error" for score in scores):
        raise ConfigError(
            f"the reward function failed on all {len(scores)} responses of the batch, the first time with: "
            f"{scores[0].reason}; correct the function, or the rows it reads"
        )


def _takes(function: Callable[..., Any], arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # some built-in functions have no signature; calling them will tell
        return arguments == 2
    return True


def _with_settings(function: Callable[..., Result], settings: RewardSettings, row: Row, response: str) -> Result:
    return function(row, response, settings)


def _describe(
    function: Callable[..., str] | None, settings: RewardSettings, kinds: Set[str], modules: Set[str] = frozenset()
) -> str:
    if function is None:
        return ""
    arguments = (settings, kinds, modules)
    return function(*arguments[: next((taken for taken in (3, 2) if _takes(function, taken)), 1)])


def _number(value: Any) -> float | None:
    """`value` as a finite float, or None. Zero-dimensional arrays and tensors count as numbers."""
    if getattr(value, "shape", None) == ():
        value = value.item()
    if not isinstance(value, numbers.Real):
        return None
    try:
        number = float(value)
    except OverflowError:  # an int beyond the range of floats
        return None
    return number if math.isfinite(number) else None


def _last_line(error: BaseException) -> str:
    return traceback.format_exception_only(error)[-1].strip()
