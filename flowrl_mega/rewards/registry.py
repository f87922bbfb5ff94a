"""Finding a reward function by name, and scoring a batch of responses without letting one bad answer end the run."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import math
import numbers
import sys
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from flowrl_mega.config import ConfigError

Reward = Callable[[dict[str, Any], str], float | tuple[float, str]]


@dataclass(frozen=True)
class Score:
    """One response's reward and the reason for it; `failed` if the reward function itself did not work."""

    reward: float
    reason: str
    failed: bool


def load_reward(spec: str) -> Reward:
    """The function named by "module:function" or "path/to/file.py:function".

    Modules in the current directory are found too. Raises ConfigError that names what cannot be imported, why, and
    the nearest function name.
    """
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name):
        raise ConfigError(f"reward = {spec!r}: must be module:function or path/to/file.py:function")
    module = _import(source, spec)
    function = getattr(module, name, None)
    if not callable(function):
        raise ConfigError(f"reward = {spec!r}: {_missing(module, name)}")
    _check_signature(function, spec)
    return function


def score_all(reward: Reward, rows: Sequence[dict[str, Any]], responses: Sequence[str]) -> list[Score]:
    """Scores each response with its row. A call that raises or returns no finite number scores 0.0 and is `failed`."""
    assert len(rows) == len(responses), f"{len(rows)} rows for {len(responses)} responses"
    return [_score(reward, row, response) for row, response in zip(rows, responses, strict=True)]


def refuse_all_failed(scores: Sequence[Score]) -> None:
    """Raises ConfigError if every call failed: a reward that never works must not train silently."""
    if scores and all(score.failed for score in scores):
        raise ConfigError(
            f"the reward function failed on all {len(scores)} responses of the batch, the first time with: "
            f"{scores[0].reason}; correct the function, or the rows it reads"
        )


def _import(source: str, spec: str) -> ModuleType:
    try:
        return _import_file(Path(source)) if source.endswith(".py") else _import_module(source)
    except Exception as error:
        raise ConfigError(
            f"reward = {spec!r}: cannot import {source!r} ({_last_line(error)}); {_fix(source)}"
        ) from error


def _fix(source: str) -> str:
    if source.endswith(".py"):
        return "give the path of a Python file that can be imported"
    return "give the name of an installed module, of one in the current directory, or the path of a .py file"


def _import_module(name: str) -> ModuleType:
    _append_path(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    name = f"reward_file_{path.stem}"
    found = importlib.util.spec_from_file_location(name, path.resolve(strict=True))
    assert found and found.loader, "a .py file always has a loader"
    _append_path(path.resolve().parent)  # so that the file can import its neighbours
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    found.loader.exec_module(module)
    return module


def _append_path(folder: Path) -> None:
    """Last on the path: a file of the user's must not shadow a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _missing(module: ModuleType, name: str) -> str:
    functions = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
    near = difflib.get_close_matches(name, functions, n=1, cutoff=0.5)
    place = getattr(module, "__file__", None) or module.__name__
    if hasattr(module, name):
        problem = f"{name!r} in {place} is not a function"
    else:
        problem = f"{place} has no function {name!r}"
    return problem + (f"; did you mean {near[0]!r}?" if near else f"; it has: {', '.join(functions) or 'none'}")


def _check_signature(function: Callable[..., Any], spec: str) -> None:
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-in functions have none; calling them will tell
        return
    try:
        signature.bind({}, "")
    except TypeError as error:
        raise ConfigError(f"reward = {spec!r}: must take (row, response), but takes {signature} ({error})") from None


def _score(reward: Reward, row: dict[str, Any], response: str) -> Score:
    try:
        result: Any = reward(row, response)
    except Exception as error:
        return Score(0.0, _last_line(error), failed=True)
    value, reason = result if isinstance(result, tuple) and len(result) == 2 else (result, "")
    number = _number(value)
    if number is None:
        return Score(0.0, f"the reward returned {result!r:.100}, not a finite number", failed=True)
    return Score(number, str(reason), failed=False)


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
