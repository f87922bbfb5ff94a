"""What makes C++ of csrc/cuda translates what it knows and refuses the rest, by file and line."""

from __future__ import annotations

import pytest
from cuda_emulation import CSRC
from cuda_emulation.translate import Unknown, translated

KNOWN = {
    "kernel<<<4, 32, 0, stream>>>(a, b);": "emulated::launch(4, 32, 0, stream, [=] { kernel(a, b); });",
    "kernel<T, 4, true><<<f(x), n, 0, s>>>(a);": "emulated::launch(f(x), n, 0, s, [=] { kernel<T, 4, true>(a); });",
    'asm("max.NaN.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));': "m = emulated::ptx_max_nan(a, b);",
    'asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));': "y = emulated::ptx_ex2_approx_ftz(x);",
    "#include <cuda_bf16.h>": '#include "cuda_emulation.h"',
    "#include <cmath>": "#include <cmath>",
    "// a <<<launch>>> in a comment, asm too": "// a <<<launch>>> in a comment, asm too",
    "A<B<C<int>>> nested;": "A<B<C<int>>> nested;",
    "const int thread = threadIdx.x;": "const int thread = threadIdx.x;",
}

UNKNOWN = {
    'asm("min.f32 %0, %1, %2;" : "=f"(m) : "f"(a), "f"(b));': "unknown PTX: min.f32",
    'asm("max.NaN.f32 %0, %1, %2, %3;" : "=f"(m) : "f"(a), "f"(b));': "unknown PTX: max.NaN.f32 %0, %1, %2, %3;",
    'asm volatile("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));': "unknown: asm",
    'asm("max.NaN.f32 %0, %1, %2;" : "=r"(m) : "r"(a), "r"(b));': "unknown PTX: max.NaN.f32",
    '__asm__("bar.sync 0;");': "unknown: __asm__",
    "(*kernel)<<<1, 32>>>(a);": "unknown: <<<",
    "extern __shared__ float buffer[];": "unknown: extern __shared__",
    "__constant__ float table[4];": "unknown: __constant__",
    "#include <cooperative_groups.h>": "unknown header: cooperative_groups.h",
    "#include <cuda/barrier>": "unknown header: cuda/barrier",
    "#include <cub/cub.cuh>": "unknown header: cub/cub.cuh",
    "#include <cuda_pipeline.h>": "unknown header: cuda_pipeline.h",
}


@pytest.mark.parametrize("text", KNOWN)
def test_what_is_known_is_translated(text):
    assert translated(f"a\n{text}\n", "x.cu") == f'#line 1 "x.cu"\na\n{KNOWN[text]}\n'


@pytest.mark.parametrize("text", UNKNOWN)
def test_what_is_not_known_is_refused(text):
    with pytest.raises(Unknown) as refused:
        translated(f"// first\n{text}\n", "x.cu")
    assert str(refused.value).startswith(f"x.cu:2: {UNKNOWN[text]}")


def test_a_binding_that_registers_otherwise_is_refused():
    """Else its kernels would be those of the CPU, or none."""
    text = (CSRC / "binding.cpp").read_text()
    assert "(flowrl_emulated, CPU, m)" in translated(text, "binding.cpp")
    with pytest.raises(Unknown, match="not found once: STABLE_TORCH_LIBRARY_IMPL"):
        translated(text.replace("(flowrl, CUDA, m)", "(flowrl, CPU, m)"), "binding.cpp")
