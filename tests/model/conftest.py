"""Where Transformer Engine's own code runs: on GPUs where there are any (tools/gpu_check.sh), else emulated on CPUs."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import transformer_engine_emulation
from rank_pool import RankPool
from transformer_engine_emulation.ranks import emulated_ranks

from flowrl_mega.parallel import backends


def te_ranks(world: int) -> Iterator[RankPool]:
    engine = backends.transformer_engine()
    if torch.cuda.is_available():
        if not engine.usable:
            pytest.skip(engine.why)
        if torch.cuda.device_count() < world:
            pytest.skip(f"needs {world} GPUs")
        pool = RankPool(world)
    else:
        if lacks := transformer_engine_emulation.lacks():
            pytest.skip(lacks)
        pool = emulated_ranks(world)
    yield pool
    pool.close()


@pytest.fixture(scope="session")
def te_ranks1() -> Iterator[RankPool]:
    """One rank with Transformer Engine."""
    yield from te_ranks(1)


@pytest.fixture(scope="session")
def te_ranks2() -> Iterator[RankPool]:
    """Two of them."""
    yield from te_ranks(2)


@pytest.fixture(scope="session")
def te_ranks4() -> Iterator[RankPool]:
    """Four of them."""
    yield from te_ranks(4)
