"""Compiles csrc/ into one native library a kind (cpu, cuda), and finds those that are compiled already.

`library(kind)` looks in this order at
  1. flowrl_mega/ops/lib/, where `pip install --no-build-isolation .` puts them, so that a cluster's ranks find them;
  2. the cache, ~/.cache/flowrl-mega/, under a key of all that a build depends on. Old keys stay: a job elsewhere may
     be about to load them, and they are small;
  3. the compiler. One process builds, the others wait at a file lock, which the kernel releases when its holder dies.
`python -m flowrl_mega.ops` does that ahead of first use.

Nothing that must be installed is imported at the top: setup.py loads this file by its path, torch or no torch.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import subprocess
import tempfile
import uuid
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Literal, NamedTuple

from flowrl_mega.file_lock import locked
from flowrl_mega.so_far import so_far

Kind = Literal["cpu", "cuda"]
KINDS: tuple[Kind, ...] = ("cpu", "cuda")

OLDEST_TORCH = (2, 11)  # its stable ABI is what we compile against, so a library serves every newer torch
FLAGS = ["-O3", "-std=c++17", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
HOST_FLAGS = ["-fPIC", "-fvisibility=hidden"]
# The CPU kernels choose at run time what to use, so one library serves all x86_64 machines that share a home. It is
# linked in this order, after the files that need none of this: of an inline function that several objects hold, the
# linker keeps the first, which must be one that every machine can run.
SIMD_FLAGS = {
    "avx2.cpp": ["-mavx2", "-mfma", "-mf16c"],
    "avx512.cpp": ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c"],
}
# Machine code for A100 and H100; other GPUs, newer ones too, compile the PTX of compute_80 when they load it.
CUDA_FLAGS = [
    "-DUSE_CUDA",
    "-gencode=arch=compute_80,code=[sm_80,compute_80]",
    "-gencode=arch=compute_90a,code=sm_90a",
]
COMPILERS = ("g++", "c++", "clang++")
USUAL_CUDA = "/usr/local/cuda"
NVCC_PLACES = f"CUDA_HOME, CUDA_PATH, PATH, {USUAL_CUDA}, pip's nvidia/cu*"
SOURCE, HEADER = (".cpp", ".cu"), (".h", ".cuh")
ERROR = re.compile(r"\b(error|fatal)\s*(#[\w-]+)?:|undefined (reference|symbol)|cannot find")  # in a compiler's output


class BuildError(Exception):
    """Why there is no library, in one message that says how to go on."""


class ToolMissing(BuildError):
    """A compiler is not there, or torch is of the wrong kind: nothing was tried."""


class Torch(NamedTuple):
    version: str  # 2.13.0+cu130
    cuda: str | None  # 13.0; None for a CPU build
    folder: Path


class Tools(NamedTuple):
    cxx: list[str]  # the C++ compiler, with arguments if CXX has some
    nvcc: str | None  # for the CUDA kind, which it compiles and links, cxx being its host compiler
    cuda: str | None  # the release of nvcc
    versions: str  # what they say of themselves


_failed: dict[Kind, str] = {}  # in this process: a build that failed is not tried again


def library(kind: Kind) -> Path:
    """The shared library of csrc/<kind> for this machine and this torch, built if it is not there. BuildError."""
    if kind in _failed:
        raise BuildError(_failed[kind])
    try:
        packaged = Path(__file__).parent / "lib" / f"{kind}.so"
        return packaged if _fits(packaged, kind, sources()) else cached(kind, sources(), default_cache())
    except BuildError as error:
        _failed[kind] = str(error)
        raise


def cached(kind: Kind, csrc: Path, cache: Path) -> Path:
    """The library in the folder `cache`, built from csrc/<kind> if it is not there."""
    try:
        tools = find_tools(kind)
    except ToolMissing:
        # A compute node need not have the compilers of the login node that built for it.
        for path in sorted(cache.glob(f"{kind}-*.so")):
            if _fits(path, kind, csrc):
                return path
        raise
    record = _record(kind, csrc, tools)
    key = hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]
    path = cache / f"{kind}-{key}.so"
    try:
        if not path.exists():
            cache.mkdir(parents=True, exist_ok=True)
            with locked(path.with_suffix(".lock")):
                if not path.exists():
                    _build(kind, csrc, tools, record, path)
    except OSError as error:
        raise BuildError(
            f"csrc/{kind} cannot be built into {cache}: {error}. XDG_CACHE_HOME names another folder for the cache"
        ) from None
    return path


def sources() -> Path:
    """csrc/: inside an installed package, beside the package in a checkout."""
    package = Path(__file__).resolve().parents[1]
    inside = package / "csrc"
    return inside if inside.is_dir() else package.parent / "csrc"


def default_cache() -> Path:
    try:
        return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowrl-mega"
    except RuntimeError:  # no home
        raise BuildError("there is no home directory for the cache: name a folder for it in XDG_CACHE_HOME") from None


# What a build depends on


def _record(kind: Kind, csrc: Path, tools: Tools) -> dict[str, str | None]:
    """Its hash is the key; beside each library it says what that was built from."""
    return {
        **_origin(kind, csrc),
        "libc": platform.libc_ver()[1],
        "torch": find_torch().version,
        "python": platform.python_version(),
        "cuda": tools.cuda,
        "compilers": tools.versions,
    }


def _origin(kind: Kind, csrc: Path) -> dict[str, str | None]:
    """The part that is the same on machines that can share a library."""
    digest = hashlib.sha256()
    for path in _files(kind, csrc, SOURCE + HEADER):
        content = path.read_bytes()
        digest.update(f"{path.name} {len(content)}\n".encode() + content)
    flags = [FLAGS, HOST_FLAGS, SIMD_FLAGS if kind == "cpu" else CUDA_FLAGS]
    return {"sources": digest.hexdigest(), "flags": json.dumps(flags), "machine": platform.machine()}


def _fits(path: Path, kind: Kind, csrc: Path) -> bool:
    """Whether the library at `path`, built on another machine perhaps, is there and can be used on this one."""
    try:
        record = json.loads(path.with_suffix(".json").read_text())
    except (OSError, ValueError):
        return False
    cuda = find_torch().cuda
    same_cuda = kind == "cpu" or (cuda is not None and _numbers(cuda)[0] == _numbers(record["cuda"])[0])
    new_libc = _numbers(record["libc"]) <= _numbers(platform.libc_ver()[1])
    same = all(record.get(name) == value for name, value in _origin(kind, csrc).items())
    return path.exists() and same_cuda and new_libc and same


def _files(kind: Kind, csrc: Path, suffixes: tuple[str, ...]) -> list[Path]:
    """Source files of csrc/<kind>, in the order of linking."""
    order = ["", *SIMD_FLAGS]
    found = [path for path in (csrc / kind).glob("*") if path.suffix in suffixes]
    if not found:
        raise BuildError(f"there are no sources in {csrc / kind}: install flowrl-mega again")
    return sorted(found, key=lambda path: (order.index(path.name) if path.name in order else 0, path.name))


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", version))


# The tools


def find_torch() -> Torch:
    try:
        import torch
    except (ImportError, OSError) as error:
        raise ToolMissing(f"torch cannot be imported ({error})") from None
    if _numbers(torch.__version__)[:2] < OLDEST_TORCH:
        raise ToolMissing(f"torch {torch.__version__} is too old: csrc needs 2.11 or newer")
    return Torch(str(torch.__version__), torch.version.cuda, Path(torch.__file__).parent)


def find_tools(kind: Kind) -> Tools:
    """The compiler of this kind; ToolMissing names those that were tried."""
    torch = find_torch()
    if kind == "cuda" and torch.cuda is None:
        raise ToolMissing(f"torch {torch.version} is a CPU build, for which there is no CUDA library")
    cxx, version = find_cxx()
    if kind == "cpu":
        return Tools(cxx, None, None, version)
    found = find_nvccs()
    for nvcc, (release, nvcc_version) in found.items():
        if _numbers(release)[0] == _numbers(torch.cuda or "")[0]:
            return Tools(cxx, nvcc, release, version + nvcc_version)
    seen = ", ".join(f"{nvcc} is {release}" for nvcc, (release, _) in found.items())
    raise ToolMissing(
        f"no nvcc of torch's CUDA {torch.cuda} found ({seen or 'none'} in {NVCC_PLACES}): install that CUDA toolkit "
        f"and name it in CUDA_HOME, or pip install 'cuda-toolkit[nvcc,cccl,cudart]=={torch.cuda}.*', "
        "or set ops.backend=torch"
    )


def find_cxx() -> tuple[list[str], str]:
    """The C++ compiler, CXX if that is set, and the text of its --version."""
    chosen = shlex.split(os.environ.get("CXX", ""))
    for command in [chosen] if chosen else [[name] for name in COMPILERS]:
        if version := _version(command):
            return command, version
    tried = f"CXX={shlex.join(chosen)}" if chosen else ", ".join(COMPILERS)
    raise ToolMissing(
        f"no C++ compiler found (tried {tried}): install one (Debian and Ubuntu: apt install g++), name it in CXX, "
        "or set ops.backend=torch"
    )


def find_nvccs() -> dict[str, tuple[str, str]]:
    """Every nvcc that runs, the preferred first: path -> (release, the text of its --version)."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    paths = [f"{home}/bin/nvcc" for home in homes if home]
    paths += [path for path in [shutil.which("nvcc"), f"{USUAL_CUDA}/bin/nvcc", *_nvccs_from_pip()] if path]
    versions = {path: _version([path]) for path in paths}
    releases = {path: re.search(r"release ([\d.]+)", version) for path, version in versions.items()}
    return {path: (release[1], versions[path]) for path, release in releases.items() if release}


def _nvccs_from_pip() -> list[str]:
    """Those of the cuda-toolkit that torch's own CUDA packages belong to (nvidia/cu13/bin), the newest first."""
    nvidia = importlib.util.find_spec("nvidia")
    folders = nvidia.submodule_search_locations if nvidia else None
    found = [path for folder in folders or () for path in Path(folder).glob("cu*/bin/nvcc")]
    return [str(path) for path in sorted(found, key=lambda path: _numbers(path.parts[-3]), reverse=True)]


def _version(command: list[str]) -> str:
    """Empty if it cannot be run."""
    try:
        result = subprocess.run([*command, "--version"], capture_output=True, text=True, env=_english())
    except OSError:
        return ""
    return result.stdout if result.returncode == 0 else ""


def _english() -> dict[str, str]:
    return {**os.environ, "LC_ALL": "C"}


# Building


def _build(kind: Kind, csrc: Path, tools: Tools, record: dict[str, str | None], path: Path) -> None:
    """Compile and link into `path`, beside which lie the record (.json) and what the compilers said (.log)."""
    linked = path.with_name(f"{path.stem}.{uuid.uuid4().hex}.part")
    log = path.with_suffix(".log")
    log.unlink(missing_ok=True)
    with tempfile.TemporaryDirectory(prefix="flowrl-mega-") as objects:
        compiling = compile_commands(kind, csrc, tools, Path(objects))
        try:
            run(list(compiling.values()), f"csrc/{kind} does not compile", log)
            run([_link_command(list(compiling), tools, linked)], f"csrc/{kind} does not link", log)
            path.with_suffix(".json").write_text(json.dumps(record, indent=1) + "\n")
            os.replace(linked, path)
        finally:
            linked.unlink(missing_ok=True)


def compile_commands(kind: Kind, csrc: Path, tools: Tools, objects: Path) -> dict[Path, list[str]]:
    """Object file -> the command that makes it, in the order of linking."""
    include = find_torch().folder / "include"
    includes = ["-isystem", str(include), "-isystem", str(include / "torch" / "csrc" / "api" / "include")]
    commands = {}
    for source in _files(kind, csrc, SOURCE):
        simd = SIMD_FLAGS.get(source.name, []) if platform.machine() == "x86_64" else []
        if tools.nvcc:
            # It hands .cpp files to the C++ compiler as they are, with the paths of its own headers.
            compiler = [*_nvcc(tools), *FLAGS, "-Xcompiler", ",".join(HOST_FLAGS), *CUDA_FLAGS]
        else:
            compiler = [*tools.cxx, *FLAGS, *HOST_FLAGS, *simd]
        target = objects / f"{source.name}.o"
        commands[target] = [*compiler, *includes, "-c", str(source), "-o", str(target)]
    return commands


def _link_command(objects: list[Path], tools: Tools, target: Path) -> list[str]:
    """Libraries of torch by name alone: torch is loaded before ours is. -z defs: what is missing is told now."""
    names = ["torch_cuda", "torch_cpu", "c10"] if tools.nvcc else ["torch_cpu", "c10"]
    wanted = ["--as-needed", "-z", "defs"]
    strict = [f"-Wl,{','.join(wanted)}"] if not tools.nvcc else ["-Xlinker", ",".join(wanted)]
    libraries = [f"-L{find_torch().folder / 'lib'}", *(f"-l{name}" for name in names)]
    if tools.nvcc:
        libraries.append(f"-L{Path(tools.nvcc).parents[1] / 'lib'}")  # pip's, where nvcc itself looks in lib64
    linker = _nvcc(tools) if tools.nvcc else tools.cxx
    return [*linker, "-shared", *strict, *map(str, objects), "-o", str(target), *libraries]


def _nvcc(tools: Tools) -> list[str]:
    assert tools.nvcc
    host = [word for word in tools.cxx if not word.startswith("-")][-1]  # of "ccache g++ -m64" it takes g++ alone
    return [tools.nvcc, "-ccbin", host]


def run(commands: Sequence[list[str]], failure: str, log: Path | None = None) -> None:
    """Run them side by side; BuildError has the first errors of the first that fails. Their output goes to `log`."""

    def one(command: list[str]) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace", env=_english()
        )

    with so_far("compiling csrc"), ThreadPoolExecutor(os.cpu_count()) as pool:
        results = list(pool.map(one, commands))
    if log:
        with log.open("a") as file:
            file.writelines(f"$ {shlex.join(result.args)}\n{result.stdout}" for result in results)
    for result in results:
        if result.returncode:
            lines = result.stdout.splitlines() or [f"exit code {result.returncode}"]
            first = next((at for at, line in enumerate(lines) if ERROR.search(line)), len(lines) - 1)
            shown = [f"  {line}" for line in lines[first : first + 4]]
            raise BuildError("\n".join([f"{failure}:", *shown, *([f"All output: {log}"] if log else [])]))
