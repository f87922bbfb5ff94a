"""Every implementation of the ops: plain torch, and csrc on each instruction set that this CPU has."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from oracle import SETS

from flowrl_mega.ops import build
from flowrl_mega.ops.kernels import Kernels, Name, kernels_for, load


@pytest.fixture(scope="session")
def native() -> str:
    """csrc for the CPU, built and loaded."""
    try:
        load("cpu")
    except build.ToolMissing as missing:
        pytest.skip(f"csrc cannot be built: {missing}")
    return "native"


@pytest.fixture(params=["torch", *SETS])
def backend(request: pytest.FixtureRequest) -> Iterator[Name]:
    """`backend=` for the ops: "torch", and "native" limited to each instruction set in turn."""
    if request.param == "torch":
        yield "torch"
        return
    request.getfixturevalue("native")
    choose, wanted = torch.ops.flowrl.cpu_instruction_set, SETS.index(request.param)
    best = choose()
    if wanted > best:
        pytest.skip(f"this CPU's best is {SETS[best]}")
    assert choose(wanted) == wanted
    yield "native"
    choose(best)


@pytest.fixture
def kernels(backend: Name) -> Kernels:
    """The four ops themselves."""
    return kernels_for(backend, torch.device("cpu"))
