"""csrc/cuda on a CPU: its sources, compiled by g++ against headers that emulate CUDA, as ops for CPU tensors.

Exact but for timing, and stricter than a GPU: barriers that are missing or not reached by all, memory that was not
written or does not belong to the kernel, misaligned vectors and undefined behaviour end a launch or show in its results
(fibers.h). What it cannot show: weak memory ordering within a warp, the true bits of ex2.approx and expf, limits of
registers, and the driver.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch

from cuda_emulation.translate import translated
from flowrl_mega.file_lock import locked
from flowrl_mega.ops import build
from flowrl_mega.ops.kernels import SCHEMAS, Kernels

HERE = Path(__file__).parent
CSRC = build.sources() / "cuda"
# nvcc contracts to fma too. The launch's faults come from traps, and longjmp goes from one stack to another.
FLAGS = "-std=c++17 -fPIC -ffp-contract=fast -U_FORTIFY_SOURCE -Wall -Werror -Wno-unknown-pragmas"
SANITIZE = "-fsanitize=undefined -fno-sanitize=vptr -fsanitize-undefined-trap-on-error"
X86 = "-mfma -mf16c"


class Emulation:
    """`kernels` are the ops on CPU tensors; they run csrc/cuda as it is until `use` says otherwise."""

    def __init__(self, cache: Path) -> None:
        """Compilation's results are kept in the folder `cache`. build.BuildError where it fails."""
        self.cache = cache
        cache.mkdir(parents=True, exist_ok=True)
        self.whole = self._library(("stats.cu", "backward.cu", "segment_reduce.cu"), {}, "-O2")
        binding = self._library(("binding.cpp", "launches.cpp"), {}, "-O1")
        if not hasattr(torch.ops.flowrl_emulated, "logprob_stats"):
            for name in Kernels._fields:
                torch.library.define(f"flowrl_emulated::{name}", SCHEMAS[name])
        torch.ops.load_library(str(binding))
        self._use = ctypes.CDLL(str(binding)).cuda_emulation_use
        self._use.argtypes, self._use.restype = [ctypes.c_char_p], ctypes.c_char_p
        self.kernels = Kernels(*(getattr(torch.ops.flowrl_emulated, name) for name in Kernels._fields))
        self.use(self.whole)

    def use(self, library: Path) -> None:
        """Launch what that library has; of what it lacks, what was launched before."""
        if error := self._use(str(library).encode()):
            raise OSError(error.decode())

    def changed(self, source: str, texts: Mapping[str, str]) -> Path:
        """The library of one source, with other texts for some of the files of csrc/cuda; compiled quickly."""
        return self._library((source,), texts, "-O1")

    def _library(self, sources: tuple[str, ...], texts: Mapping[str, str], optimize: str) -> Path:
        """Compiled and linked, if it is not in the cache."""
        cxx, version = build.find_cxx()
        torch_folder = build.find_torch().folder
        include = [torch_folder / "include", torch_folder / "include" / "torch" / "csrc" / "api" / "include"]
        kernels = all(source.endswith(".cu") for source in sources)
        flags = [optimize, *FLAGS.split(), *(SANITIZE.split() if kernels else ()), build.FLAGS[-1]]
        flags += X86.split() if platform.machine() == "x86_64" else []
        flags += [f"-I{HERE}", *(word for path in include for word in ("-isystem", str(path)))]
        files = {path.name: path.read_text() for path in sorted(HERE.glob("*.[hc]*")) if path.suffix != ".pyc"}
        for path in sorted(CSRC.iterdir()):
            name = f"{path.stem}.cpp" if path.suffix == ".cu" else path.name
            files[name] = translated(texts.get(path.name, path.read_text()), path.name)
        key = hashlib.sha256(repr((sources, files, flags, version, torch.__version__)).encode()).hexdigest()[:16]
        library = self.cache / f"{key}.so"
        with locked(self.cache / f"{key}.lock"):
            if not library.exists():
                with tempfile.TemporaryDirectory() as place:
                    self._compile(Path(place), files, sources, [*cxx, *flags], library)
        return library

    @staticmethod
    def _compile(
        folder: Path, files: Mapping[str, str], sources: tuple[str, ...], compiler: list[str], library: Path
    ) -> None:
        for name, text in files.items():
            (folder / name).write_text(text)
        inputs = [folder / f"{Path(source).stem}.cpp" for source in sources]
        objects = [path.with_suffix(".o") for path in inputs]
        commands = [
            [*compiler, f"-I{folder}", "-c", str(path), "-o", str(target)]
            for path, target in zip(inputs, objects, strict=True)
        ]
        build.run(commands, "csrc/cuda does not compile for the emulation")
        part = folder / "library.so"
        libraries = [f"-L{build.find_torch().folder / 'lib'}", "-ltorch_cpu", "-lc10", "-ldl"]
        link = [*compiler, "-shared", "-Wl,--as-needed", *map(str, objects), "-o", str(part), *libraries]
        build.run([link], "csrc/cuda does not link for the emulation")
        shutil.move(part, library)
