"""The enumerable space, written once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path

import pytest
from torch import Tensor

from examples.exact import space


@pytest.fixture(scope="session")
def task(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return space.write_task(tmp_path_factory.mktemp("exact"))


@pytest.fixture(scope="session")
def ref_logp(task: Path) -> Tensor:
    return space.reference_logp(task)
