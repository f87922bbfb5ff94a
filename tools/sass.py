"""Counts what nvcc made of csrc/cuda: registers, spilled bytes and instructions of each kernel, by GPU.

    python tools/sass.py build/cuda

The loop is the one that loads: of a row kernel 64 bytes of logits a thread, so that its instructions by the logits in
them are the issue slots that a logit takes. `make build-cuda-check` compiles the objects and calls this; no GPU is
needed. Without cuobjdump and nvdisasm (CUDA's toolkit has them, and requirements/dev.txt) nothing is counted.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import NamedTuple

FUNCTION = re.compile(r"^\s*Function\s*:?\s*(\w+)")
INSTRUCTION = re.compile(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);")
BRANCH = re.compile(r"\bBRA\b.*\b0x([0-9a-f]+)")
LOAD = re.compile(r"\bLDG\b")
ARCHITECTURE = re.compile(r"code for (sm_\w+)")
USAGE = re.compile(r"\bREG:(\d+).*\bLOCAL:(\d+)")


class Kernel(NamedTuple):
    """A kernel as one GPU's machine code."""

    architecture: str
    name: str
    registers: int
    local_bytes: int  # a thread's, where registers do not suffice
    instructions: int
    loop: int  # instructions of the loop that loads; 0: none does


def main() -> int:
    objects = sorted(parser().parse_args().objects.glob("*.o"))
    tools = find_tools()
    if tools is None:
        print("instructions are not counted: there are no cuobjdump and nvdisasm in PATH or pip's nvidia/cu*")
        return 0
    kernels = [kernel for path in objects for kernel in read(path, *tools)]
    print(f"{'GPU':<8}{'registers':>10}{'spilled':>9}{'instructions':>14}{'in its loop':>13}  kernel")
    for k in sorted(kernels):
        print(f"{k.architecture:<8}{k.registers:>10}{k.local_bytes:>9}{k.instructions:>14}{k.loop:>13}  {k.name}")
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("objects", type=Path, help="folder with the object files of csrc/cuda")
    return parser


def find_tools() -> tuple[str, str] | None:
    """cuobjdump, and the PATH by which it finds nvdisasm."""
    of_pip = sorted(Path(sysconfig.get_path("purelib")).glob("nvidia/cu*/bin"), reverse=True)
    path = os.pathsep.join([os.environ.get("PATH", ""), *map(str, of_pip), "/usr/local/cuda/bin"])
    found = shutil.which("cuobjdump", path=path)
    return (found, path) if found and shutil.which("nvdisasm", path=path) else None


def read(path: Path, cuobjdump: str, search: str) -> list[Kernel]:
    """The kernels in an object file; one without any has none."""

    def told(option: str) -> str:
        command = [cuobjdump, option, str(path)]
        return subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PATH": search}).stdout

    return kernels_of(told("-sass"), told("-res-usage"))


def kernels_of(sass: str, usage: str) -> list[Kernel]:
    """From what cuobjdump says with -sass and with -res-usage, which list the functions in one order."""
    found: list[tuple[str, str, list[tuple[int, str]]]] = []
    architecture = ""
    for line in sass.splitlines():
        if match := ARCHITECTURE.search(line):
            architecture = match[1]
        elif match := FUNCTION.match(line):
            found.append((architecture, match[1], []))
        elif found and (match := INSTRUCTION.match(line)):
            found[-1][2].append((int(match[1], 16), match[2]))
    names = demangled([name for _, name, _ in found])
    numbers = [(int(registers), int(local)) for registers, local in USAGE.findall(usage)]
    return [
        Kernel(architecture, name, *used, instructions=len(code), loop=loop_that_loads(code))
        for (architecture, _, code), name, used in zip(found, names, numbers, strict=True)
    ]


def loop_that_loads(code: list[tuple[int, str]]) -> int:
    """Instructions from the target of a branch to the branch, of the loop with the most loads of global memory, and of
    several with as many the shortest: an outer loop, or what is kept out of line and comes back, holds them too."""
    at = {address: number for number, (address, _) in enumerate(code)}
    jumps = [(address, int(match[1], 16)) for address, text in code if (match := BRANCH.search(text))]
    loops = [code[at[to] : at[address] + 1] for address, to in jumps if to < address]
    counted = [(sum(bool(LOAD.search(text)) for _, text in loop), -len(loop)) for loop in loops]
    return -max((found for found in counted if found[0]), default=(0, 0))[1]


def demangled(names: list[str]) -> list[str]:
    """As C++ writes them, without arguments and namespaces; as they are where there is no c++filt."""
    if not shutil.which("c++filt"):
        return names
    text = subprocess.run(["c++filt"], input="\n".join(names), capture_output=True, text=True).stdout
    short = [re.sub(r"\(anonymous namespace\)::|flowrl::cuda::|^void ", "", line) for line in text.splitlines()]
    return [re.sub(r"\(.*", "", re.sub(r"\(bool\)([01])", r"\1", line)) for line in short]


if __name__ == "__main__":
    sys.exit(main())
