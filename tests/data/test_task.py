"""What `data.task` can name, and what it says where that is no task. tests/cli trains on one."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.data.sums import Sums
from flowrl_mega.data.task import task_rows

TASKS = """
class Count:
    def __init__(self, n):
        if n > 9:
            raise ValueError(f"n={n} is above 9")
        self.n = n

    def rows(self):
        return ({"prompt": str(i)} for i in range(self.n))

class NoRows:
    pass

number = 5
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    (tmp_path / "tasks.py").write_text(TASKS)
    return tmp_path / "tasks.py"


def test_rows_of_a_class_in_a_file_or_a_module(file: Path) -> None:
    """Rows may be any iterable; the built-in task is one of the same form."""
    assert task_rows(f"{file}:Count", {"n": 2}) == [{"prompt": "0"}, {"prompt": "1"}]
    assert task_rows("sums", {"lo": 5, "hi": 7}) == task_rows("flowrl_mega.data.sums:Sums", {"lo": 5, "hi": 7})
    assert task_rows("sums", {}) == Sums().rows()


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("Cound", {}, "data.task = '{}:Cound': {} has no 'Cound'; did you mean 'Count'?"),
        ("number", {}, "data.task = '{}:number': is a int; must be a class"),
        ("NoRows", {}, "data.task = '{}:NoRows': has no method rows"),
        ("Count", {}, "data.task_args = {}: "),
        ("Count", {"m": 1}, "unexpected keyword argument 'm'"),
        ("Count", {"n": 10}, "data.task_args = {'n': 10}: n=10 is above 9"),
    ],
)
def test_what_is_no_task(name: str, arguments: dict[str, int], message: str, file: Path) -> None:
    if arguments or "task_args" not in message:
        message = message.replace("{}", str(file))
    with pytest.raises(ConfigError, match=re.escape(message)):
        task_rows(f"{file}:{name}", arguments)
