"""The emulation has teeth: faults planted in csrc/cuda, of the kinds that CUDA code has, are caught by tests."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import NamedTuple

import pytest
import test_cuda
import test_logprob
import test_logprob_edges
import test_segments
import torch
from cuda_emulation import CSRC, Emulation

from flowrl_mega.ops import kernels as kernels_module

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="test_cuda.py does not run the emulation here"),
]

NO_MEMORY, UNDEFINED = "memory that is not there", "misaligned access, or otherwise undefined"


class Planted(NamedTuple):
    """A fault in a file of csrc/cuda, and the test that catches it: by what the emulation says, or wrong values."""

    file: str
    old: str
    new: str
    test: Callable[[Emulation, pytest.MonkeyPatch], None]
    said: str | None = None
    source: str = "stats.cu"  # whose kernels are looked at, where `file` is a header

    def name(self) -> str:
        return self.source if self.file.endswith("h") else self.file


def emulated(test: Callable[..., None], *arguments: object) -> Callable[[Emulation, pytest.MonkeyPatch], None]:
    """A test of test_cuda.py."""
    return lambda emulation, patch: test(*arguments, test_cuda.Emulated())


def in_both_orders(columns: int) -> Callable[[Emulation, pytest.MonkeyPatch], None]:
    test = test_cuda.test_the_order_of_threads_does_not_change_a_bit
    return lambda emulation, patch: test("fp32", columns, test_cuda.Emulated(), patch)


def shared(test: Callable[..., None], *arguments: object) -> Callable[[Emulation, pytest.MonkeyPatch], None]:
    """A test that all implementations have, whose last argument is `backend`."""
    return lambda emulation, patch: test(*arguments, "native")


def of_kernels(test: Callable[..., None]) -> Callable[[Emulation, pytest.MonkeyPatch], None]:
    return lambda emulation, patch: test(emulation.kernels)


NAN = test_logprob_edges.test_nan_and_infinity_come_out_as_nan
VALUES, PLACES = test_cuda.test_equals_log_softmax_in_float64, test_cuda.test_where_a_row_lies_does_not_change_a_bit
FAR = emulated(test_cuda.test_a_view_of_more_than_2_to_the_31_elements)

FAULTS = {
    "a barrier is missing": Planted("stats.cu", "  __syncthreads();\n", "", in_both_orders(4104)),
    "a barrier is missing in a tree": Planted("segment_reduce.cu", "    __syncthreads();\n", "", in_both_orders(300)),
    "a barrier that some threads do not reach": Planted(
        "stats.cu", "if (warps == 1) return p;", "if (warp > 1) return p;", in_both_orders(33000), "that do not come"
    ),
    "shared memory that was not written": Planted(
        "stats.cu", "lane < warps ? of_warp", "lane < 16 ? of_warp", emulated(VALUES, "fp32", 16385)
    ),
    "shared memory beyond its end": Planted(
        "segment_reduce.cu", "i < 3; ++i) sums[i][tid]", "i <= 3; ++i) sums[i][tid]", in_both_orders(300), UNDEFINED
    ),
    "too many threads": Planted(
        "stats.cu", "MAX_THREADS = 512", "MAX_THREADS = 2048", emulated(VALUES, "fp32", 151936), "invalid configuration"
    ),
    "a row offset of 32 bits": Planted(
        "stats.cu", "t * logits.row_stride;", "static_cast<int>(t * logits.row_stride);", FAR
    ),
    "a row offset of 32 bits, written to": Planted(
        "backward.cu", "t * g.row_stride;", "static_cast<int>(t * g.row_stride);", FAR
    ),
    "a stride that is not looked at": Planted(
        "row.cuh", " && row_stride * element % bytes == 0;", ";", emulated(PLACES, "bf16", 300), UNDEFINED
    ),
    "a base that is not looked at": Planted(
        "row.cuh",
        "reinterpret_cast<uintptr_t>(data) % bytes == 0 && ",
        "",
        emulated(PLACES, "fp32", 300),
        UNDEFINED,
        "backward.cu",
    ),
    "a half taken from the wrong side of a word": Planted(
        "row.cuh", "8 * static_cast<unsigned>(address & 3)", "0u", emulated(PLACES, "bf16", 300)
    ),
    "vectors read beyond the end": Planted(
        "stats.cu",
        "if (!EDGE || column + k * step < end)\n      raw[k]",
        "if (true)\n      raw[k]",
        emulated(VALUES, "fp32", 255),
        NO_MEMORY,
    ),
    "a vector written beyond the valid columns": Planted(
        "backward.cu", "c >= valid && c + VEC <= columns", "c >= valid", emulated(PLACES, "fp32", 9), NO_MEMORY
    ),
    "a NaN that the maximum of pairs drops": Planted(
        "row.cuh", 'asm("max.NaN.bf16x2', 'asm("max.bf16x2', shared(NAN, torch.nan, "bf16")
    ),
    "masked pairs that are not raised": Planted(
        "row.cuh", "max_bf16x2(x[i], floor)", "x[i]", shared(test_logprob_edges.test_masked_logits, "bf16")
    ),
    "a floor that is too high": Planted(
        "row.cuh",
        "fmaf(fabsf(low), -0.0078125f, low)",
        "low + 100.0f / inv_temperature",
        emulated(VALUES, "bf16", 1024),
    ),
    "the last columns forgotten": Planted("stats.cu", "< valid - whole)", "< 0)", emulated(VALUES, "bf16", 33)),
    "a maximum that drops NaN": Planted(
        "row.cuh",
        'asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));',
        "result = fmaxf(a, b);",
        emulated(test_cuda.test_nan_and_infinity_come_out, torch.nan),
    ),
    "0 times infinity": Planted(
        "row.cuh",
        "fmaxf((x[i] - top) * inv_temperature, -86.0f)",
        "(x[i] - top) * inv_temperature",
        shared(test_logprob_edges.test_masked_logits, "fp32"),
    ),
    "an entropy that is not rescaled": Planted(
        "row.cuh", "weight * (p.dsum + delta * p.sum)", "weight * p.dsum", emulated(VALUES, "fp32", 1024)
    ),
    "a result that is not written": Planted(
        "stats.cu", "out[3 * logits.rows + t]", "out[3 * logits.rows]", emulated(VALUES, "fp32", 33)
    ),
    "offsets that are believed": Planted(
        "segment_reduce.cu",
        "clamped(s.cu_seqlens[b], 0, s.rows)",
        "s.cu_seqlens[b]",
        of_kernels(test_segments.test_offsets_out_of_range_do_not_read_out_of_bounds),
        NO_MEMORY,
    ),
    "NaN times a gradient of 0": Planted(
        "backward.cu",
        " || (grad == 0.0f && offset == 0.0f && slope == 0.0f);",
        ";",
        shared(test_logprob_edges.test_rows_without_gradient_are_stored_as_0, "fp32", True),
    ),
    "1 - p": Planted(
        "backward.cu",
        "-scale * expm1f(e)",
        "scale * (1.0f - expf(e))",
        of_kernels(test_logprob.test_the_gradient_of_a_near_certain_target_does_not_cancel),
    ),
}


@pytest.fixture
def planted(request: pytest.FixtureRequest, emulation: Emulation, monkeypatch: pytest.MonkeyPatch) -> Iterator[Planted]:
    """In place of the right kernel."""
    fault = FAULTS[request.param]
    text = (CSRC / fault.file).read_text()
    assert text.count(fault.old) == 1
    monkeypatch.setattr(kernels_module, "NATIVE", emulation.kernels)
    emulation.use(emulation.changed(fault.name(), {fault.file: text.replace(fault.old, fault.new)}))
    yield fault
    emulation.use(emulation.whole)


@pytest.mark.parametrize("planted", FAULTS, indirect=True)
def test_a_planted_fault_is_caught(planted, emulation, monkeypatch):
    """By wrong values, or by the emulation, which then says what it saw and in which thread."""
    with pytest.raises(RuntimeError if planted.said else AssertionError, match=planted.said):
        planted.test(emulation, monkeypatch)


def test_after_a_fault_the_right_kernels_are_right(emulation, monkeypatch):
    """Also where a launch has ended in the middle of a block."""
    monkeypatch.setattr(kernels_module, "NATIVE", emulation.kernels)
    test = in_both_orders(4104)
    text = (CSRC / "stats.cu").read_text().replace("if (warps == 1) return p;", "if (warp == 1) return p;")
    emulation.use(broken := emulation.changed("stats.cu", {"stats.cu": text}))
    for library, ends in ((broken, False), (emulation.whole, True), (broken, False), (emulation.whole, True)):
        emulation.use(library)
        with nullcontext() if ends else pytest.raises(RuntimeError, match="that do not come"):
            test(emulation, monkeypatch)
