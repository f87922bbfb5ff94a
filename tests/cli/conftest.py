"""A tiny model with a tokenizer, one whole run, and one conversion, that many tests look at."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))  # for crashes and convert_jobs

from convert_jobs import Example  # noqa: E402
from jobs import Job, write_config  # noqa: E402
from tiny_models import make  # noqa: E402


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd vocabulary, so that tp = 2 pads it."""
    return make("llama", tmp_path_factory.mktemp("model"), vocab=15)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Path:
    """The folder of a run of 6 steps at tp = 2 that nothing disturbed: config.yaml and run/. Not to be changed."""
    folder = tmp_path_factory.mktemp("finished")
    Job(["train", str(write_config(folder, model))], folder / "log").run()
    return folder


@pytest.fixture(autouse=True)
def alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """No launcher's environment, also where the tests themselves run under one."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def example(tmp_path_factory: pytest.TempPathFactory) -> Example:
    """A model and the checkpoint made of it. Not to be changed."""
    return Example(tmp_path_factory.mktemp("example"))


@pytest.fixture
def work(tmp_path: Path) -> Path:
    """Where nothing may be left of what fails; logs lie elsewhere."""
    (tmp_path / "work").mkdir()
    return tmp_path / "work"
