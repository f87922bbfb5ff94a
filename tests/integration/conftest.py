"""What several of the integration tests share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from slurm_cluster import Cluster


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """A SLURM of two nodes."""
    cluster = Cluster(tmp_path_factory.mktemp("slurm"))
    yield cluster
    cluster.close()
