"""What several of the integration tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from slurm_cluster import Cluster

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM of two nodes."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()


@pytest.fixture(scope="session")
def smollm2() -> Path:
    """The example's model folder, made with its data where they are missing."""
    from examples.smollm2.run import RUN, prepare

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        prepare()
    return ROOT / RUN / "model"
