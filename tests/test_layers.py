"""Imports run downward only, and in no circle: also those inside functions and those for type checkers."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

import flowrl_mega

ROOT = Path(flowrl_mega.__file__).parent
# From the top: a room (a package, or a module beside them) may import rooms of lower levels only, none of its own.
LEVELS = (
    {"cli"},
    {"ablation", "quickstart", "reproduce"},
    {"report"},
    {"job"},
    {"run"},
    {"train"},
    {"experience", "evaluate", "preflight", "reference_answers"},
    {"learner", "grading", "resume", "host_checks", "network", "benchmark"},
    {"rollout", "data", "rewards", "evaluation", "checkpoint", "monitor"},
    {"model", "objectives"},
    {"parallel", "ops"},
    {"faults"},
    {"config_file"},
    {"config_moves", "config_rules", "imports", "run_lock", "launched", "json_file"},
    {"config_eval"},
    {"config"},
    {"config_reward", "config_rollout"},
    {"settings", "metrics", "file_lock", "hangup", "so_far", "whole_file"},
)
LEVEL = {room: level for level, rooms in enumerate(LEVELS) for room in rooms}


def module_name(file: Path, root: Path) -> str:
    parts = file.relative_to(root.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imported(source: str, modules: set[str]) -> Iterator[str]:
    """The modules of the package that a source imports anywhere in it."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in modules)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"relative import of {node.module}: say flowrl_mega. in full"
            for alias in node.names:
                full = f"{node.module}.{alias.name}"
                if found := next((name for name in (full, node.module) if name in modules), None):
                    yield found


def imports(root: Path) -> dict[str, set[str]]:
    """Every module of the package at `root`, and the modules of the package that it imports."""
    files = {module_name(file, root): file for file in sorted(root.rglob("*.py"))}
    return {name: set(imported(file.read_text(), set(files))) - {name} for name, file in files.items()}


def room(module: str) -> str:
    return module.split(".")[1]


def between_rooms(found: dict[str, set[str]]) -> dict[str, set[str]]:
    """ "importer -> imported" modules of different rooms, by importer."""
    return {
        name: {other for other in others if "." in other and room(other) != room(name)}
        for name, others in found.items()
        if "." in name
    }


def upward(found: dict[str, set[str]]) -> list[str]:
    """The imports that do not go to a lower level."""
    return [
        f"{name} imports {other}"
        for name, others in between_rooms(found).items()
        for other in sorted(others)
        if LEVEL[room(name)] >= LEVEL[room(other)]
    ]


def circle(found: dict[str, set[str]]) -> list[str]:
    """The modules of one circle, or none."""
    try:
        TopologicalSorter(found).prepare()
    except CycleError as error:
        return list(error.args[1])
    return []


@pytest.fixture(scope="module")
def found() -> dict[str, set[str]]:
    return imports(ROOT)


def test_every_room_has_a_level(found):
    rooms = {room(name) for name in found if "." in name}
    assert rooms <= LEVEL.keys(), "a new room: give it a level in LEVELS"


def test_imports_run_downward_only(found):
    assert upward(found) == []


def test_no_modules_import_each_other_in_a_circle(found):
    assert circle(found) == []


@pytest.mark.parametrize(
    "line",
    [
        "from flowrl_mega.model.precision import layer_spec",
        "from flowrl_mega.model import precision",
        "import flowrl_mega.model.precision",
        "def late():\n    from flowrl_mega.model.precision import layer_spec",
        "if TYPE_CHECKING:\n    from flowrl_mega.model.precision import layer_spec",
    ],
)
def test_an_import_is_found_however_it_is_written(found, line):
    changed = found | {"flowrl_mega.config": set(imported(line, set(found)))}
    assert set(upward(changed)) - set(upward(found)) == {"flowrl_mega.config imports flowrl_mega.model.precision"}
    assert circle(changed), "precision reads config's types"
