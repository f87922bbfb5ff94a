"""Every HTTP path stands in one file, one coroutine each; what does not know SGLang does not import it."""

from __future__ import annotations

import ast
import asyncio
import inspect
import re
from pathlib import Path
from typing import Any

import pytest

import flowrl_mega.rollout
from flowrl_mega.rollout.sglang.endpoints import SglangRouter, SglangServer

ROLLOUT = Path(flowrl_mega.rollout.__file__).parent
ENDPOINTS = ROLLOUT / "sglang" / "endpoints.py"


def literals(file: Path) -> set[str]:
    """The string literals of a file that are paths."""
    constants = (node.value for node in ast.walk(ast.parse(file.read_text())) if isinstance(node, ast.Constant))
    return {value for value in constants if isinstance(value, str) and re.fullmatch(r"/[a-z][\w/]*", value)}


def test_no_path_stands_anywhere_else() -> None:
    """Of SGLang's protocol; chat.py has that of OpenAI."""
    others = [file for file in ROLLOUT.rglob("*.py") if file not in (ENDPOINTS, ROLLOUT / "chat.py")]
    assert {file: found for file in others if (found := literals(file))} == {}
    assert len(literals(ENDPOINTS)) == 21


class Recording(SglangRouter):
    """A server that notes what would be sent."""

    def __init__(self) -> None:
        super().__init__("http://nowhere")
        self.sent: list[tuple[str, str, Any, float]] = []

    async def _request(self, method: str, path: str, body: Any, timeout_s: float, *_: Any) -> Any:
        self.sent.append((method, path, body, timeout_s))


COROUTINES = {
    name: function
    for name, function in vars(SglangServer).items() | vars(SglangRouter).items()
    if inspect.iscoroutinefunction(function) and not name.startswith("_") and name != "generate"
}


@pytest.mark.parametrize("name", sorted(COROUTINES))
def test_a_coroutine_asks_for_the_path_of_its_name(name: str) -> None:
    """Once, within the time that it was given."""
    server = Recording()
    parameters = list(inspect.signature(COROUTINES[name]).parameters)[1:]
    asyncio.run(COROUTINES[name](server, **{p: 7.5 if p == "timeout_s" else p for p in parameters}))
    ((method, path, body, timeout_s),) = server.sent
    assert path == ("/v1/models" if name == "models" else f"/{name}")
    assert timeout_s == 7.5
    assert (body is None) == (method == "GET")


def test_every_path_has_its_coroutine() -> None:
    """With /generate, which the dispatcher's tests are about."""
    assert len(COROUTINES) + 1 == len(literals(ENDPOINTS))


@pytest.mark.parametrize("file", sorted(path.name for path in ROLLOUT.glob("*.py") if path.name != "__init__.py"))
def test_what_another_engine_can_use_does_not_import_sglang(file: str) -> None:
    tree = ast.parse((ROLLOUT / file).read_text())
    modules = {node.module or "" for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert not [module for module in modules if "sglang" in module]
