"""csrc/cuda as C++ for g++: launches and inline PTX become calls, and nothing else of the text is touched.

What it does not know it refuses, by file and line: a construct that slipped through unread would be one that the
emulation does not run as a GPU does. Names that the emulation lacks are left to the compiler, which refuses them too.
"""

from __future__ import annotations

import re

LAUNCH = re.compile(r"(\w+(?:<[^<>;]*>)?)<<<([^;]*?)>>>\(([^;]*)\);")
ASM = re.compile(r'asm\("([^"]*)" : "=([fr])"\((\w+)\) : "\2"\((\w+)\)(?:, "\2"\((\w+)\))?\);')
PTX = {  # instruction and the kind of its registers -> its function in cuda_emulation.h
    ("max.NaN.f32 %0, %1, %2;", "f"): "ptx_max_nan",
    ("max.NaN.bf16x2 %0, %1, %2;", "r"): "ptx_max_nan_bf16x2",
    ("max.bf16x2 %0, %1, %2;", "r"): "ptx_max_bf16x2",
    ("ex2.approx.ftz.f32 %0, %1;", "f"): "ptx_ex2_approx_ftz",
}
HEADERS = ("cuda_runtime.h", "cuda_runtime_api.h", "cuda_bf16.h", "cuda_fp16.h")
INCLUDE = re.compile(r"#include <(\w*(?:cuda|cooperative_groups|cub)\w*(?:/[\w./]*|\.\w+)?)>")
# Of the binding: where torch's own CUDA part comes in, and what it registers its kernels for.
BINDING = {
    "#include <torch/csrc/stable/accelerator.h>": '#include "torch_emulation.h"',
    "STABLE_TORCH_LIBRARY_IMPL(flowrl, CUDA, m)": "STABLE_TORCH_LIBRARY_IMPL(flowrl_emulated, CPU, m)",
}
UNKNOWN = re.compile(r"<<<|\basm\b|\b__asm__\b|\bextern\s+__shared__|\b__constant__|\b__managed__|\btexture<")


class Unknown(Exception):
    """What the translator has no reading for."""


def translated(text: str, name: str) -> str:
    """The text of the file `name` of csrc/cuda; Unknown says where there is something that it cannot translate."""

    def refuse(at: int, what: str) -> Unknown:
        return Unknown(f"{name}:{text.count(chr(10), 0, at) + 1}: {what}")

    def instruction(match: re.Match[str]) -> str:
        ptx, registers, out, *inputs = match.groups()
        if (ptx, registers) not in PTX:
            raise refuse(match.start(), f"unknown PTX: {ptx}")
        return f"{out} = emulated::{PTX[ptx, registers]}({', '.join(x for x in inputs if x)});"

    def include(match: re.Match[str]) -> str:
        if match[1] not in HEADERS:
            raise refuse(match.start(), f"unknown header: {match[1]}")
        return '#include "cuda_emulation.h"'

    def launch(match: re.Match[str]) -> str:
        kernel, shape, arguments = match.groups()
        return f"emulated::launch({shape}, [=] {{ {kernel}({arguments}); }});"

    found = text
    for pattern, replacement in ((INCLUDE, include), (ASM, instruction), (LAUNCH, launch)):
        found = pattern.sub(replacement, found)
    if name == "binding.cpp":
        for old, new in BINDING.items():
            if found.count(old) != 1:
                raise refuse(0, f"not found once: {old}")
            found = found.replace(old, new)
    code = re.sub(r"//.*", "", found)
    if left := UNKNOWN.search(code):
        raise Unknown(f"{name}:{code.count(chr(10), 0, left.start()) + 1}: unknown: {left[0]}")
    return f'#line 1 "{name}"\n{found}'
