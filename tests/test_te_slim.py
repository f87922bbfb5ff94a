"""tools/te_slim.py on a library of which the CUDA compiler made the device code."""

from __future__ import annotations

import base64
import csv
import ctypes
import hashlib
import importlib.util
import io
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

TOOL = Path(__file__).resolve().parents[1] / "tools" / "te_slim.py"
NVCC = shutil.which("nvcc")
# nvcc may be a wrapper elsewhere in PATH; the assembler and the packer lie beside the real one.
FOLDERS = [str(Path(NVCC).resolve().parent)] if NVCC else []
PTXAS, FATBINARY = (
    shutil.which(name, path=os.pathsep.join([*FOLDERS, "/usr/local/cuda/bin", os.environ.get("PATH", "")]))
    for name in ("ptxas", "fatbinary")
)
pytestmark = [
    pytest.mark.tools,
    pytest.mark.skipif(
        not (PTXAS and FATBINARY and shutil.which("g++")), reason="needs CUDA's ptxas and fatbinary, and g++"
    ),
]
PTX = ".version 8.0\n.target sm_%d\n.address_size 64\n.visible .entry nothing() { ret; }\n"
# Two fat binaries, one after the other, with host code that looks at the second one's header.
HOST = """
.section .nv_fatbin, "a"
.balign 8
first: .incbin "both.fatbin"
.balign 8
second: .incbin "other.fatbin"
.section .text
.globl magic
.type magic, @function
magic: leaq second(%rip), %rax
movl (%rax), %eax
ret
.section .note.GNU-stack, "", @progbits
"""


def tool() -> ModuleType:
    spec = importlib.util.spec_from_file_location("te_slim", TOOL)
    module = importlib.util.module_from_spec(spec)
    sys.modules["te_slim"] = module
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """both.fatbin has machine code for 80 and 90; other.fatbin code for 80, and PTX for 75 and 80."""
    folder = tmp_path_factory.mktemp("fatbin")

    def run(*command: str) -> None:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, timeout=120)

    for arch in (75, 80, 90):
        (folder / f"{arch}.ptx").write_text(PTX % arch)
        run(PTXAS, f"-arch=sm_{arch}", f"{arch}.ptx", "-o", f"{arch}.cubin")
    images = {
        "both": ["kind=elf,sm=80,file=80.cubin", "kind=elf,sm=90,file=90.cubin"],
        "other": ["kind=elf,sm=80,file=80.cubin", "kind=ptx,sm=75,file=75.ptx", "kind=ptx,sm=80,file=80.ptx"],
        "only90": ["kind=elf,sm=90,file=90.cubin"],
        "only80": ["kind=ptx,sm=80,file=80.ptx"],
    }
    for name, parts in images.items():
        pieces = [f"--image3={part}" for part in parts]
        run(FATBINARY, "-64", "--compress-mode=none", f"--create={name}.fatbin", *pieces)
    (folder / "host.S").write_text(HOST)
    run("g++", "-shared", "-fPIC", "host.S", "-o", "lib.so")
    return folder


def test_only_what_runs_there_is_left(folder):
    """The compiler's own files are looked for in the bytes. Code for 80 cannot run on 9.0; PTX for it can, and is all
    that the second one has."""
    whole = (folder / "lib.so").read_bytes()
    slim = tool().slim_library(whole, 90)
    assert len(slim) == len(whole)
    code80, code90 = ((folder / name).read_bytes() for name in ("80.cubin", "90.cubin"))
    ptx75, ptx80 = b".target sm_75", b".target sm_80"
    assert [whole.count(x) for x in (code80, code90, ptx75, ptx80)] == [2, 1, 1, 1]
    assert [slim.count(x) for x in (code80, code90, ptx75, ptx80)] == [0, 1, 0, 1]


def test_it_is_as_if_compiled_for_the_one(folder):
    """Bit for bit what NVIDIA's own tool packs when it is given nothing else."""
    whole = (folder / "lib.so").read_bytes()
    slim = tool().slim_library(whole, 90)
    for name in ("only90", "only80"):
        wanted = (folder / f"{name}.fatbin").read_bytes()
        assert wanted in slim and wanted not in whole


def test_the_library_still_works_and_lists_one_architecture(folder, tmp_path):
    """Nothing else has moved: host code finds what it finds by address."""
    library = tmp_path / "slim.so"
    library.write_bytes(tool().slim_library((folder / "lib.so").read_bytes(), 90))
    magic = ctypes.CDLL(str(library)).magic
    magic.restype = ctypes.c_uint32
    assert magic() == 0xBA55ED50
    if listing := shutil.which("cuobjdump"):
        said = subprocess.run([listing, "-lelf", str(library)], capture_output=True, text=True, check=True).stdout
        assert "sm_90" in said and "sm_80" not in said


def test_where_nothing_fits_all_stays(folder):
    whole = (folder / "lib.so").read_bytes()
    assert tool().slim_library(whole, 70) == whole


def test_a_wheel_keeps_its_files_and_says_what_they_are_now(folder, tmp_path):
    """Names, other files and the list of hashes; a build tag tells it from the original."""
    wheel = tmp_path / "engine_cu13-2.0-py3-none-any.whl"
    record = "engine/lib.so,sha256=old,1\nengine/__init__.py,sha256=same,0\nengine_cu13-2.0.dist-info/RECORD,,\n"
    with zipfile.ZipFile(wheel, "w") as made:
        made.write(folder / "lib.so", "engine/lib.so")
        made.writestr("engine/__init__.py", "")
        made.writestr("engine_cu13-2.0.dist-info/RECORD", record)
    slim = tool().slim_wheel(wheel, tmp_path, 90)
    assert slim.name == "engine_cu13-2.0-0sm90-py3-none-any.whl"
    with zipfile.ZipFile(slim) as made:
        assert made.namelist() == zipfile.ZipFile(wheel).namelist()
        library = made.read("engine/lib.so")
        rows = list(csv.reader(io.StringIO(made.read("engine_cu13-2.0.dist-info/RECORD").decode())))
    digest = hashlib.sha256(library).digest()
    assert rows[0] == [
        "engine/lib.so",
        "sha256=" + base64.urlsafe_b64encode(digest).decode().rstrip("="),
        str(len(library)),
    ]
    assert rows[1:] == [["engine/__init__.py", "sha256=same", "0"], ["engine_cu13-2.0.dist-info/RECORD", "", ""]]
    assert (folder / "80.cubin").read_bytes() not in library
