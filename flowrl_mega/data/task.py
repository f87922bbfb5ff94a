"""Tasks: rows that a program makes, instead of a file. `data.task` names a built-in one, or a class from anywhere."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol, runtime_checkable

from flowrl_mega.config import ConfigError
from flowrl_mega.data.prompts import Row
from flowrl_mega.data.sums import Sums
from flowrl_mega.imports import load

BUILT_IN = {"sums": Sums}


@runtime_checkable
class Task(Protocol):
    """A class of this form can be a `data.task`; `data.task_args` are the arguments of its constructor.

    Every rank makes an instance, so the same arguments must give the same rows, in the same order.
    """

    def rows(self) -> Iterable[Row]:
        """The data set: dicts of JSON values, each with "prompt" and what the reward reads.

        A row may list its "right_answers": evaluation then computes pass rate and coverage exactly.
        """


def task_rows(name: str, arguments: dict[str, Any]) -> list[Row]:
    """The rows of the task `name`: "sums", "module:Class" or "path/to/file.py:Class".

    Raises ConfigError if there is no such class, if it refuses its arguments (with a TypeError or a ValueError), or if
    it has no method rows.
    """
    task_class = BUILT_IN.get(name) or load(name, "data.task")
    if not callable(task_class):
        raise ConfigError(f"data.task = {name!r}: is a {type(task_class).__name__}; must be a class with a method rows")
    try:
        task = task_class(**arguments)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"data.task_args = {arguments!r}: {error}") from None
    if not isinstance(task, Task):
        raise ConfigError(f"data.task = {name!r}: has no method rows; docs/data.md shows what a task is")
    return list(task.rows())
