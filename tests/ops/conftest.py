"""Every implementation of the ops: plain torch, csrc on each instruction set of this CPU, and csrc/cuda emulated."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from cuda_emulation import Emulation
from oracle import BACKENDS, SETS

from flowrl_mega.ops import build
from flowrl_mega.ops import kernels as kernels_module
from flowrl_mega.ops.kernels import Kernels, Name, kernels_for, load


@pytest.fixture(scope="session")
def native() -> str:
    """csrc for the CPU, built and loaded."""
    try:
        load("cpu")
    except build.ToolMissing as missing:
        pytest.skip(f"csrc cannot be built: {missing}")
    return "native"


@pytest.fixture(scope="session")
def emulation() -> Emulation:
    """csrc/cuda for tensors on the CPU, built where csrc's own libraries are."""
    try:
        return Emulation(build.default_cache() / "cuda_emulation")
    except build.BuildError as error:
        if isinstance(error, build.ToolMissing) or "_Float16" in str(error):  # which g++ has since 12
            pytest.skip(f"csrc/cuda cannot be emulated: {error}")
        raise


def is_float64(parameter: object) -> bool:
    return isinstance(parameter, (str, torch.dtype)) and parameter in ("fp64", torch.float64)


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Name]:
    """`backend=` for the ops: "torch", "native" limited to each instruction set in turn, and in "native"'s place the
    emulated CUDA kernels, which have no float64."""
    if request.param == "torch":
        yield "torch"
        return
    if request.param == "cuda":
        if any(is_float64(value) for value in request.node.callspec.params.values()):
            pytest.skip("the CUDA kernels have no float64")
        monkeypatch.setattr(kernels_module, "NATIVE", request.getfixturevalue("emulation").kernels)
        yield "native"
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
