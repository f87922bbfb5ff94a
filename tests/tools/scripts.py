"""The scripts of tools/ and examples/ that are meant to be run, and their argument parsers."""

from __future__ import annotations

import argparse
import importlib.util
import sys
from functools import cache
from pathlib import Path

REPO = Path(__file__).resolve().parents[2]
FOLDERS = ("tools", "examples")


def commands() -> list[Path]:
    """Every Python file with a `__main__` part and every shell script, relative to the repository."""
    files = [file for folder in FOLDERS for file in sorted((REPO / folder).rglob("*"))]
    return [file.relative_to(REPO) for file in files if is_command(file)]


def is_command(file: Path) -> bool:
    return file.suffix == ".sh" or (file.suffix == ".py" and '\nif __name__ == "__main__":\n' in file.read_text())


def is_module(script: Path) -> bool:
    """Examples are modules, run with -m; tools are run by their path."""
    return script.parts[0] == "examples"


def command_line(script: Path) -> list[str]:
    """How a user starts it, from whatever folder."""
    if script.suffix == ".sh":
        return [str(REPO / script)]
    if is_module(script):
        return [sys.executable, "-m", ".".join(script.with_suffix("").parts)]
    return [sys.executable, str(REPO / script)]


@cache
def parser_of(script: Path) -> argparse.ArgumentParser:
    """What its `parser` function returns; of a shell script that of the Python file of the same name."""
    path = REPO / script.with_suffix(".py")
    spec = importlib.util.spec_from_file_location("_".join(script.with_suffix("").parts), path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.path.insert(0, str(path.parent))  # for what it imports by name, as it does when it is run
    try:
        spec.loader.exec_module(module)
        return module.parser()
    finally:
        sys.path.remove(str(path.parent))
