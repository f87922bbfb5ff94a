"""Loading a user's own object by name; what it is used for is tested beside each setting."""

import pickle
import sys

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.imports import load, load_with_module
from flowrl_mega.rewards import sums

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import helper_of_mine

@dataclass
class Result:  # dataclasses look their module up in sys.modules
    value: float

CONSTANT = 3

def length(text):
    return Result(float(len(text)) + helper_of_mine.OFFSET)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with a file and a module that it imports; the current directory is another."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "my_own.py").write_text(SOURCE)
    (tmp_path / "mine" / "helper_of_mine.py").write_text("OFFSET = 0.5\n")
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "mine"
    for name in ("my_own", "helper_of_mine", "colorsys"):
        sys.modules.pop(name, None)


def test_an_installed_module():
    assert load("flowrl_mega.rewards.sums:score", "reward") is sums.score


def test_a_module_in_the_current_directory(folder, monkeypatch):
    """An installed command does not have the current directory on its path, yet users put their files there."""
    monkeypatch.chdir(folder)
    assert load("my_own:length", "reward")("abc").value == 3.5
    assert load("my_own:CONSTANT", "reward") == 3


@pytest.mark.parametrize("path", ["mine/my_own.py", "{folder}/my_own.py"])
def test_a_file_with_its_neighbours(folder, path):
    """By a path relative to the current directory, or an absolute one; the file imports one that lies beside it."""
    found, module = load_with_module(f"{path.format(folder=folder)}:length", "reward")
    assert found("abc").value == 3.5 and module.CONSTANT == 3


def test_a_file_is_imported_once(folder):
    """Else every call would make a new class, which is no instance of the one before; pickle finds it too."""
    result = load("mine/my_own.py:Result", "reward")
    assert load(f"{folder}/my_own.py:Result", "reward") is result
    assert pickle.loads(pickle.dumps(result(1.0))) == result(1.0)


def test_files_of_the_same_name_are_two_modules(folder):
    (folder.parent / "my_own.py").write_text("CONSTANT = 4\n")
    assert [load(f"{path}:CONSTANT", "reward") for path in ("mine/my_own.py", "my_own.py")] == [3, 4]


def test_a_file_that_failed_is_tried_again(folder):
    """Not found half imported in sys.modules the second time."""
    (folder / "late.py").write_text("VALUE = 1\nimport helper_that_comes_later\n")
    with pytest.raises(ConfigError, match="helper_that_comes_later"):
        load("mine/late.py:VALUE", "reward")
    with pytest.raises(ConfigError, match="helper_that_comes_later"):
        load("mine/late.py:VALUE", "reward")


def test_a_users_file_does_not_shadow_a_library(folder, monkeypatch):
    """A folder with a file named like a library must not break later imports of that library."""
    (folder / "colorsys.py").write_text("VALUE = 1\n")
    monkeypatch.chdir(folder)
    sys.modules.pop("colorsys", None)
    with pytest.raises(ConfigError, match=r"colorsys.py has no 'VALUE'"):
        load("colorsys:VALUE", "reward")
    assert load("colorsys.py:VALUE", "reward") == 1


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("no_colon", "must be module:name or path/to/file.py:name"),
        (":length", "must be module:name"),
        ("my_own.py:", "must be module:name"),
        ("nowhere_at_all:length", r"cannot import 'nowhere_at_all' \(ModuleNotFoundError: No module named 'nowhere_at"),
        ("missing.py:length", r"cannot import 'missing.py' \(FileNotFoundError.*give the path of a Python file"),
        ("broken.py:length", r"cannot import 'broken.py' \(SyntaxError"),
        ("needs.py:length", r"cannot import 'needs.py' \(ModuleNotFoundError: No module named 'not_installed'"),
        ("my_own.py:lenght", "my_own.py has no 'lenght'; did you mean 'length'"),
        ("my_own.py:zzz", "my_own.py has no 'zzz'; it has: Result, length$"),
        ("empty.py:zzz", "empty.py has no 'zzz'; it has: none"),
    ],
)
def test_errors_name_the_setting_the_value_the_cause_and_the_fix(folder, monkeypatch, spec, message):
    monkeypatch.chdir(folder)
    (folder / "broken.py").write_text("def length(:\n")
    (folder / "needs.py").write_text("import not_installed\n")
    (folder / "empty.py").write_text("")
    with pytest.raises(ConfigError, match=message) as caught:
        load(spec, "rollout.engine")
    assert str(caught.value).startswith(f"rollout.engine = {spec!r}: ")
