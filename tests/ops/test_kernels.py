"""The ops under torch.library, the choice between native kernels and plain torch, and what the kernels refuse."""

from __future__ import annotations

import logging
import platform
from pathlib import Path
from typing import Any

import pytest
import torch
from oracle import DTYPES, IGNORED, SETS, case, same_bits
from torch._subclasses.fake_tensor import FakeTensorMode

from flowrl_mega.ops import build, describe, kernels, logprob

CPU = torch.device("cpu")
OPS = torch.ops.flowrl


def arguments(op: str, dtype: torch.dtype = torch.float32, rows: int = 6, columns: int = 20) -> tuple[Any, ...]:
    """Good ones for each op."""
    c = case(rows, columns, dtype)
    c.target[1:2] = IGNORED
    precision = c.grad.dtype
    tau, zeros = torch.ones(1, dtype=precision), torch.zeros(rows, dtype=precision)
    stats = torch.ones(2, 4, rows, dtype=precision)
    place = (0, max(0, columns - 3), IGNORED)
    gradient = (c.logits, c.target.clamp(max=max(0, columns - 4)), c.grad, zeros, zeros, tau, *place)
    return {
        "logprob_stats": (c.logits, c.target, tau, *place, True),
        "segment_reduce": (stats, c.target, tau, torch.tensor([0, min(rows, 2), rows]), IGNORED),
        "logprob_backward_": gradient,
        "logprob_backward": (*gradient, dtype),
    }[op]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", kernels.Kernels._fields)
def test_opcheck(op, dtype, native):
    """Schema (what is written, what is aliased), shapes under fake tensors, and tracing with dynamic shapes."""
    results = torch.library.opcheck(getattr(OPS, op).default, arguments(op, DTYPES[dtype]))
    assert set(results.values()) == {"SUCCESS"}


@pytest.mark.parametrize("to", ["bf16", "fp16"])
def test_opcheck_of_the_half_gradient(to, native):
    """The one op whose result has another type than its input."""
    some = (*arguments("logprob_backward")[:-1], DTYPES[to])
    assert set(torch.library.opcheck(OPS.logprob_backward.default, some).values()) == {"SUCCESS"}


@pytest.mark.parametrize("op", ["logprob_backward_", "logprob_backward"])
def test_opcheck_of_the_gradient_of_entropy(op, native):
    """Two more arguments, which may be left out."""
    some = (*arguments(op), torch.ones(6), torch.ones(6))
    assert set(torch.library.opcheck(getattr(OPS, op).default, some).values()) == {"SUCCESS"}


@pytest.mark.parametrize("slope", [torch.ones(5), torch.ones(6).double(), torch.ones(6, 2)[:, 0]])
def test_the_kernels_refuse_a_wrong_slope(slope, native):
    """As any other number a row."""
    with pytest.raises(RuntimeError, match="slope must"):
        OPS.logprob_backward_(*arguments("logprob_backward_"), torch.ones(6), slope)


@pytest.mark.parametrize("op", ["logprob_stats", "segment_reduce", "logprob_backward"])
@pytest.mark.parametrize(("rows", "columns"), [(6, 20), (0, 20), (6, 0), (0, 0)])
def test_every_implementation_has_the_shapes_of_the_fake_one(op, rows, columns, kernels):
    """Also at the ends."""
    some = arguments(op, torch.bfloat16, rows, columns)
    found = getattr(kernels, op)(*some)
    with FakeTensorMode() as mode:
        fake = getattr(OPS, op)(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in some))
    for a, b in zip(*((x,) if isinstance(x, torch.Tensor) else x for x in (found, fake)), strict=True):
        assert (a.shape, a.dtype, a.stride()) == (b.shape, b.dtype, b.stride())


# (op, place of the argument, what is there, what the message says)
WRONG: dict[str, tuple[str, int, Any, str]] = {
    "logits of one dimension": ("logprob_stats", 0, torch.zeros(6), r"logits must have shape \[T, V'\]"),
    "integer logits": ("logprob_stats", 0, torch.zeros(6, 20).long(), "logits must be float32, bfloat16"),
    "logits by columns": ("logprob_stats", 0, torch.zeros(20, 6).t(), r"neighbouring columns .*contiguous"),
    "logits that overlap": ("logprob_stats", 0, torch.zeros(1, 20).expand(6, 20), "must not overlap: row stride 0"),
    "short target": ("logprob_stats", 1, torch.zeros(5).long(), r"target must have shape \[6\]"),
    "int32 target": ("logprob_stats", 1, torch.zeros(6).int(), "target must be int64"),
    "strided target": ("logprob_stats", 1, torch.zeros(6, 2).long()[:, 0], "target must be contiguous"),
    "double temperature": ("logprob_stats", 2, torch.ones(1).double(), "inv_temperature must be float32"),
    "two temperatures": ("logprob_stats", 2, torch.ones(2), r"inv_temperature must have shape \[6\]"),
    "temperature of no dimension": ("logprob_stats", 2, torch.tensor(1.0), "inv_temperature must have shape"),
    "too many columns": ("logprob_stats", 4, 21, r"vocab_valid = 21: must lie in 0\.\.20"),
    "columns below 0": ("logprob_stats", 4, -1, r"vocab_valid = -1"),
    "stats of two dimensions": ("segment_reduce", 0, torch.ones(4, 6), r"stats must have shape \[W, 4, T\]"),
    "three statistics": ("segment_reduce", 0, torch.ones(2, 3, 6), r"stats must have shape \[W, 4, T\]"),
    "half statistics": ("segment_reduce", 0, torch.ones(2, 4, 6).half(), "stats must be float32 or float64"),
    "strided statistics": ("segment_reduce", 0, torch.ones(2, 6, 4).mT, "stats must be contiguous"),
    "double statistics alone": ("segment_reduce", 0, torch.ones(2, 4, 6).double(), "inv_temperature must be float64"),
    "no offsets": ("segment_reduce", 3, torch.zeros(0).long(), r"cu_seqlens must have shape \[B \+ 1\]"),
    "int32 offsets": ("segment_reduce", 3, torch.tensor([0, 6]).int(), "cu_seqlens must be int64"),
    "double gradient": ("logprob_backward_", 2, torch.zeros(6).double(), "grad must be float32"),
    "short gradient": ("logprob_backward_", 2, torch.zeros(5), r"grad must have shape \[6\]"),
    "half maximum": ("logprob_backward_", 3, torch.zeros(6).half(), "maximum must be float32"),
    "short log_sum": ("logprob_backward_", 4, torch.zeros(7), r"log_sum must have shape \[6\]"),
    "logits that overlap, written": ("logprob_backward_", 0, torch.zeros(20).unfold(0, 10, 2), "must not overlap"),
    "offset without slope": ("logprob_backward_", 9, torch.zeros(6), "offset and slope go together"),
    "gradient of another type": ("logprob_backward", 9, torch.float64, "dtype must be that of the logits"),
    "gradient of integers": ("logprob_backward", 9, torch.int32, "dtype must be float32"),
}


@pytest.mark.parametrize("wrong", WRONG)
def test_the_kernels_refuse(wrong, native):
    """Called past the Python checks they must not read or write out of bounds."""
    op, place, value, message = WRONG[wrong]
    some = list(arguments(op))
    some[place : place + 1] = [value]
    with pytest.raises(RuntimeError, match=message):
        getattr(OPS, op)(*some)


def test_wide_gradients_of_half_logits_are_refused(native):
    """A bf16 row would be read as float32."""
    some = (*arguments("logprob_backward", torch.bfloat16)[:-1], torch.float32)
    with pytest.raises(RuntimeError, match="only float32 logits can give a bfloat16 or float16 gradient"):
        OPS.logprob_backward(*some)


def test_targets_out_of_range_touch_nothing(kernels):
    """On CUDA their values are checked too late to stop the kernel: an id of no column is one of another shard."""
    c = case(4, 20)
    c.target[:] = torch.tensor([2**40, -(2**40), 20, -1])
    stats = kernels.logprob_stats(c.logits, c.target, torch.ones(1), 0, 20, IGNORED, True)
    assert torch.equal(stats[3], torch.zeros(4))
    wanted = torch.softmax(c.logits.double(), 1) * -c.grad[:, None]
    kernels.logprob_backward_(c.logits, c.target, c.grad, stats[0], stats[1].log(), torch.ones(1), 0, 20, IGNORED)
    assert (c.logits - wanted).abs().max() < 1e-6


# The choice


@pytest.fixture
def no_library(monkeypatch):
    """As on a machine without compiler, in a fresh process."""

    def refuse(kind: str) -> Path:
        raise build.ToolMissing("no C++ compiler found (tried g++)")

    caches = (kernels.load, kernels._fault, kernels._warn)
    for cache in caches:
        cache.cache_clear()
    monkeypatch.setattr(build, "library", refuse)
    yield
    for cache in caches:
        cache.cache_clear()


def test_auto_without_a_library_is_plain_torch_and_one_warning(no_library, caplog):
    """A job goes on, and its log says once why it is slow."""
    c = case(6, 50)
    with caplog.at_level(logging.WARNING, "flowrl_mega"):
        found = [logprob(c.logits, c.target, backend="auto") for _ in range(3)]
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "plain torch" in caplog.text and "no C++ compiler found" in caplog.text
    wanted = logprob(c.logits, c.target, backend="torch")
    assert all(same_bits(x, y) for result in found for x, y in zip(result, wanted, strict=True))
    assert describe("auto", CPU).startswith("plain torch, since no C++ compiler found")


def test_native_without_a_library_raises_every_time(no_library):
    """Whoever asks for it does not want to find out from the speed."""
    c = case(6, 50)
    for _ in range(2):
        with pytest.raises(build.BuildError, match="no C[+][+] compiler found"):
            logprob(c.logits, c.target, backend="native")
    with pytest.raises(build.BuildError):
        describe("native", CPU)


def test_torch_never_asks_for_a_library(monkeypatch):
    """It is the way out where a build hangs or crashes."""
    kernels.load.cache_clear()
    monkeypatch.setattr(build, "library", lambda kind: pytest.fail("asked"))
    assert kernels.kernels_for("torch", CPU) is kernels.TORCH
    assert describe("torch", CPU) == "plain torch"


def test_a_library_that_does_not_load_is_told_with_its_path(monkeypatch, tmp_path):
    """A file cut short on a full disk, say."""
    broken = tmp_path / "cpu-0.so"
    broken.write_text("no library")
    kernels.load.cache_clear()
    monkeypatch.setattr(build, "library", lambda kind: broken)
    with pytest.raises(build.BuildError, match=r"cpu-0\.so cannot be loaded .*remove it"):
        kernels.load("cpu")


def test_auto_takes_the_native_kernels(native, caplog):
    """Without a word."""
    assert kernels.kernels_for("auto", CPU) is kernels.kernels_for("native", CPU) is kernels.NATIVE
    assert not caplog.records
    assert describe("auto", CPU) == describe("native", CPU)


def test_the_best_instruction_set_is_taken(native):
    """What the kernel says of the CPU; a fall-back to plain C++ is ten times slower and would not be noticed."""
    flags = Path("/proc/cpuinfo")
    if platform.machine() != "x86_64" or not flags.exists():
        assert OPS.cpu_instruction_set(2) == 0
        return
    has = set(next(line for line in flags.read_text().splitlines() if line.startswith("flags")).split())
    avx512 = {"avx512f", "avx512bw", "avx512dq", "avx512vl"} <= has
    best = "avx512" if avx512 else "avx2" if {"avx2", "fma"} <= has else "plain"
    assert SETS[OPS.cpu_instruction_set(2)] == best
    assert describe("native", CPU).endswith({"avx512": "AVX-512", "avx2": "AVX2", "plain": "plain C++"}[best])
