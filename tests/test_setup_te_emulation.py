"""Transformer Engine's Python is unpacked once for all clones, and is the version that GPU machines get."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.tools

REPO = Path(__file__).resolve().parent.parent
MODULES = ("setup", "user_cache", "setup_te_emulation")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The tool with a cache of its own; what it would have installed is in `tool.ran`."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    tool: Any = importlib.import_module("setup_te_emulation")
    tool.PINS = tmp_path / "list.txt"
    tool.PINS.write_text("transformer-engine==1.0\n")
    tool.ran = []
    tool.venv_tool.run = lambda *words: None
    tool.venv_tool.pip = lambda *words: (Path(words[3]).mkdir(), tool.ran.append(words))
    yield tool
    for name in MODULES:
        sys.modules.pop(name, None)


def test_it_is_made_once(tool: Any, tmp_path: Path) -> None:
    """With nothing beside it, above all no other torch; another list is another folder."""
    folder = tool.set_up()
    assert tool.set_up() == folder and len(tool.ran) == 1
    assert tool.ran[0] == ("--no-deps", "--only-binary=:all:", "--target", str(folder), "-r", str(tool.PINS))
    tool.PINS.write_text("transformer-engine==2.0\n")
    assert tool.set_up() != folder and len(tool.ran) == 2


def test_one_that_failed_is_made_anew(tool: Any) -> None:
    (folder := tool.set_up()).joinpath(tool.COMPLETE).unlink()
    folder.joinpath("half").touch()
    assert tool.set_up() == folder and len(tool.ran) == 2 and not folder.joinpath("half").exists()


def test_the_version_is_that_of_gpu_machines(tool: Any) -> None:
    gpu_wheels: Any = importlib.import_module("gpu_wheels")
    pins = (REPO / "requirements" / "te_emulation.txt").read_text()
    assert f"\ntransformer-engine=={gpu_wheels.TE_VERSION}\n" in pins
