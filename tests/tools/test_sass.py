"""tools/sass.py: what it counts, on listings as cuobjdump writes them, and on a kernel that nvcc compiles here."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from flowrl_mega.ops import build

pytestmark = pytest.mark.tools

sys.path.insert(0, str(Path(__file__).parents[2] / "tools"))

import sass  # noqa: E402

ENCODING = "/* 0x0000000a00ff017b82 */\n" + " " * 90 + "/* 0x000fe20000000800 */"


def listing(name: str, *code: str) -> str:
    lines = [f"        /*{16 * n:04x}*/                   {text} ;   {ENCODING}" for n, text in enumerate(code)]
    return "\n".join(["\tcode for sm_90a", f"\t\tFunction : {name}", *lines, "\t\t.........."])


USAGE = " Function _Z1fv:\n  REG:40 STACK:0 SHARED:192 LOCAL:16 CONSTANT[0]:640 TEXTURE:0\n"


def test_the_loop_is_the_one_that_loads():
    """Not the longest span of a jump back, as of a slow path at the end, nor the jump to itself after EXIT."""
    code = ["MOV R1, R2", "LDG.E.EF.128 R4, desc[UR4][R2.64]", "FADD R1, R1, R4", "@P0 BRA 0x10", "IMAD R5, R5, R5"]
    code += ["@P1 BRA 0x40", "EXIT", "@P2 BRA 0x0", "BRA 0x80"]
    (kernel,) = sass.kernels_of(listing("_Z1fv", *code), USAGE)
    assert kernel == ("sm_90a", "f", 40, 16, 9, 3)


def test_without_a_load_there_is_no_such_loop():
    (kernel,) = sass.kernels_of(listing("_Z1fv", "MOV R1, R2", "@P0 BRA 0x0", "EXIT"), USAGE)
    assert kernel.loop == 0


def test_names_are_those_of_the_source():
    mangled = "_ZN6flowrl4cuda40_GLOBAL__N__8a4b319c_8_stats_cu_70921e2b12stats_kernelI13__nv_bfloat16Lb0ELb1EEEvPf"
    assert sass.demangled([mangled]) == ["stats_kernel<__nv_bfloat16, false, true>"]


def test_a_kernel_compiled_here(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    found = build.find_nvccs()
    if not found or sass.find_tools() is None:
        pytest.skip("no nvcc, or no cuobjdump and nvdisasm")
    source = tmp_path / "sum.cu"
    source.write_text(
        "__global__ void total(const float* x, int n, float* to) {\n"
        "  float sum = 0;\n#pragma unroll 1\n  for (int i = 0; i < n; ++i) sum += x[i];\n  *to = sum;\n}\n"
    )
    nvcc = next(iter(found))
    subprocess.run([nvcc, "-arch=sm_90a", "-c", str(source), "-o", str(tmp_path / "sum.o")], check=True, timeout=120)
    monkeypatch.setattr(sys, "argv", ["sass.py", str(tmp_path)])
    assert sass.main() == 0
    (kernel,) = sass.read(tmp_path / "sum.o", *sass.find_tools())
    assert kernel.architecture == "sm_90a" and kernel.name == "total" and kernel.local_bytes == 0
    assert 4 <= kernel.loop < kernel.instructions, "a load, a sum, a count, a comparison and a branch"
    assert " total" in capsys.readouterr().out


def test_without_the_tools_it_says_so(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sass, "find_tools", lambda: None)
    monkeypatch.setattr(sys, "argv", ["sass.py", str(tmp_path)])
    assert sass.main() == 0
    assert "not counted: there are no cuobjdump and nvdisasm" in capsys.readouterr().out
