"""Fixtures that more than one test file uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

import pytest

# Tests import their helpers (rank_pool, tiny_models, on_ranks, stand_in) by name.
for folder in ("", "distributed", "rollout", "integration"):
    sys.path.insert(0, str(Path(__file__).parent / folder))

from rank_pool import RankPool  # noqa: E402

import flowrl_mega.parallel  # noqa: E402, F401  before any test imports megatron


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", default=None, help="folder of real data (make test DATA=DIR)")


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two gloo ranks that stay up for the session."""
    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    """A job of one rank, in a process of its own so that pytest's stays free of process groups."""
    pool = RankPool(1)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def tiny_llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tiny_models import make

    return make("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Gives the folder of a tiny random model of this kind (and these changes to it), made once a session."""
    from tiny_models import make

    return cache(lambda kind, **changes: make(kind, tmp_path_factory.mktemp(kind), **changes))
