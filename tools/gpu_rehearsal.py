"""tools/gpu_check.sh --rehearse: the same script where there is no GPU, so that on one what shows is about the GPU.

Each item runs its own command, made small, in processes that take themselves for one with an H100: Transformer
Engine's own Python over an emulated native part, csrc/cuda emulated on the CPU (tests/transformer_engine_emulation,
tests/ops/cuda_emulation). Tests start the emulations themselves. Packages are installed for the GPU machine's Python,
to see that pip takes them, and not used. What works is "rehearsed" in the table; figures mean nothing. Table and logs
are left in --out FOLDER (build/gpu_rehearsal), nothing in tools/benchmarks/results.
"""

from __future__ import annotations

import os
import sys
import tarfile
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gpu_check
from gpu_items import Item, Row
from gpu_wheels import PLATFORM

TESTS = gpu_check.REPO / "tests"
AT_START = TESTS / "transformer_engine_emulation" / "at_start"


@contextmanager
def rehearsal(results: Path | None, out: Path | None) -> Iterator[gpu_check.Check]:
    """One that knows of nothing that was done before."""
    with tempfile.TemporaryDirectory(prefix="gpu_rehearsal.") as folder:
        state = Path(folder)
        yield Rehearsal(state, results or state / "results", out or gpu_check.REPO / "build" / "gpu_rehearsal")


class Rehearsal(gpu_check.Check):
    def __init__(self, state: Path, results: Path, out: Path | None = None) -> None:
        super().__init__(state, results, out)
        self.unused = self.library = state / "unused"  # of another Python, and for GPUs

    def probe(self) -> dict[str, Any]:
        found = super().probe()
        if "error" in found:
            return found
        if found.get("gpu"):
            return {"error": "this machine has a GPU, which --rehearse cannot use"}
        sys.path.append(str(TESTS))
        import transformer_engine_emulation

        if lacks := transformer_engine_emulation.lacks():
            return {"error": lacks}
        emulated = {"gpu": "no GPU: rehearsed, and no figure means anything", "gpus": 4}
        self.machine |= emulated | {"transformer-engine": "emulated", "transformer-engine-torch": "emulated"}
        return self.machine

    def lacks(self, file: Path) -> bool:
        return True

    def put(self, name: str, wheels: list[Path]) -> None:
        if wheels:
            # pip holds what a file says of Python against its own.
            options = ["--target", str(self.unused), "--upgrade", "--ignore-requires-python", *PLATFORM]
            self.pip(name, ["install", *options, *map(str, wheels)])

    def install_engine(self, wheels: Path | None) -> None:
        """Its wheels; the source of its torch part is unpacked and not compiled."""
        if wheels is None or not wheels.is_dir():
            return
        self.put("Transformer Engine's wheels", sorted(wheels.glob("transformer_engine*.whl")))
        for source in wheels.glob("transformer_engine_torch-*.tar.gz"):
            with tarfile.open(source) as archive:
                archive.extractall(self.state / "sources", filter="data")
            assert (self.state / "sources" / source.name.removesuffix(".tar.gz") / "setup.py").is_file()

    def obstacle(self, item: Item) -> str:
        return super().obstacle(item._replace(program=""))

    def command(self, item: Item) -> str:
        return item.instead or f"{item.command} {item.small}"

    def extra(self, item: Item) -> dict[str, str]:
        if " -m " in self.command(item):  # pytest; or nvcc
            return {}
        path = [str(AT_START), str(gpu_check.REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
        return {"PYTHONPATH": os.pathsep.join(path)}

    def judge(self, row: Row) -> Row:
        """Nothing that was begun may come to nothing; a goal that is missed is one for a GPU."""
        if row.verdict.startswith("not run"):
            return row._replace(verdict=f"failed: {row.verdict}")
        return row if row.verdict.startswith("failed") else row._replace(verdict="rehearsed")
