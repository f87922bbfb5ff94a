"""Fixtures that more than one test file uses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from rank_pool import RankPool

# Tests import their helpers (rank_pool, tiny_models, on_ranks, stand_in) by name. Torch and Megatron take seconds to
# import, so nothing here does it before a test asks: `pytest tests/config` needs neither.
for folder in ("", "distributed", "rollout", "rollout/sglang", "integration"):
    sys.path.insert(0, str(Path(__file__).parent / folder))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--data", default=None, help="folder of real data (make test DATA=DIR)")


@pytest.fixture(scope="session")
def ranks2() -> Iterator[RankPool]:
    """Two gloo ranks that stay up for the session."""
    from rank_pool import RankPool

    pool = RankPool(2)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def ranks1() -> Iterator[RankPool]:
    """A job of one rank, in a process of its own so that pytest's stays free of process groups."""
    from rank_pool import RankPool

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
