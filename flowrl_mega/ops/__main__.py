"""`python -m flowrl_mega.ops` (make build): csrc built ahead of use; with --check-cuda only compiled, for each GPU."""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from flowrl_mega.ops import build


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flowrl_mega.ops", description="Build csrc ahead of use.")
    parser.add_argument(
        "--check-cuda", type=Path, metavar="FOLDER", help="only compile csrc/cuda, whatever torch is there, into FOLDER"
    )
    try:
        folder = parser.parse_args(arguments).check_cuda
        return _check_cuda(folder) if folder else _build_all()
    except build.BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def _build_all() -> int:
    """What this machine can have: CPU always, CUDA where torch has it and there is an nvcc for it."""
    for kind in build.KINDS:
        began = time.monotonic()
        try:
            path = build.library(kind)
        except build.ToolMissing as error:
            if kind == "cpu":
                raise
            print(f"{kind}: not built: {error}")
        else:
            print(f"{kind}: {path} ({time.monotonic() - began:.1f} s)", flush=True)
    return 0


def _check_cuda(objects: Path) -> int:
    """Compiles for every GPU in CUDA_FLAGS and links nothing, so it needs neither a GPU nor torch's CUDA build."""
    found = build.find_nvccs()
    if not found:
        print(f"csrc/cuda is not checked: there is no nvcc in {build.NVCC_PLACES}")
        return 0
    nvcc, (release, _) = next(iter(found.items()))
    cxx, _ = build.find_cxx()
    began = time.monotonic()
    objects.mkdir(parents=True, exist_ok=True)
    commands = build.compile_commands("cuda", build.sources(), build.Tools(cxx, nvcc, release, ""), objects)
    build.run(list(commands.values()), f"csrc/cuda does not compile with {nvcc} {release}")
    names = ", ".join(path.stem for path in commands)
    print(f"csrc/cuda compiles with {nvcc} {release}: {names} ({time.monotonic() - began:.1f} s)")
    return 0


if __name__ == "__main__":
    sys.exit(main())
