"""Install Transformer Engine into .venv, for training on GPUs: `make setup-te`.

It needs a .venv with PyTorch's CUDA build (make setup TORCH=cuda), but no GPU: a cluster's login node will do. Its
torch part is compiled for that torch, about 25 minutes of one core, by g++ with the headers of PyTorch's own CUDA
packages. The result is kept in the user's cache, for all clones and for the next .venv.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import tarfile
from pathlib import Path

from gpu_wheels import TORCH_STAND_IN
from user_cache import cache, key, locked

import setup as venv_tool
from setup import ROOT, SetupError, phase, pip, run

PINS = ROOT / "requirements" / "te.txt"
COMPILED = "transformer-engine-torch"
OLDEST_TORCH, CUDA = (2, 11), 13
SHOW = """
import json, sys, torch
from importlib import metadata, util
versions = {d.metadata["Name"].lower().replace("_", "-"): d.version for d in metadata.distributions()}
nvidia = util.find_spec("nvidia")
roots = list(nvidia.submodule_search_locations) if nvidia else []
print(json.dumps([torch.__version__, torch.version.cuda, sys.version, roots, versions]))
"""
TRY = "import torch, transformer_engine.pytorch as te; print(te.Linear(16, 16)(torch.ones(16, 16).cuda()).sum().item())"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Install Transformer Engine into .venv, for training on GPUs.")
    parser.add_argument("--fetch", action="store_true", help="fetch all that it takes, and compile nothing")
    return parser


def main() -> None:
    fetch = parser().parse_args().fetch
    try:
        set_up(fetch)
    except SetupError as error:
        log = f"\nAll output: {venv_tool.LOG}" if venv_tool.LOG.exists() else ""
        sys.exit(f"setup-te: {error}{log}")


def set_up(fetch: bool = False) -> None:
    torch, cuda, python, _, versions = what_is_there()
    check_torch(torch, cuda)
    wanted = pinned()
    missing = {name: version for name, version in wanted.items() if versions.get(name) != version}
    if not missing:
        print("Transformer Engine is up to date in .venv")
        return
    folder = cache() / f"te-{torch}-{key(wanted[COMPILED], torch, python, sys.platform)}"
    with locked(folder.with_suffix(".lock"), "Transformer Engine"):
        folder.mkdir(exist_ok=True)
        others = [f"{name}=={version}" for name, version in missing.items() if name != COMPILED]
        if others:
            with phase("Transformer Engine and what it imports"):
                pip("--no-deps", "--only-binary=:all:", *others)
        if not list(folder.glob("*.whl")):
            sources = source(folder, wanted[COMPILED])
            if fetch:
                print(f"not compiled (--fetch): {sources}")
                return
            with phase("its torch part, compiled"):
                compile_for(folder, sources)
        with phase("its torch part"):
            pip("--no-deps", *map(str, folder.glob("*.whl")))
    venv_tool.compile_all()
    if venv_tool.has_gpu():
        run(str(venv_tool.PYTHON), "-c", TRY)
    else:
        print("no GPU here, so it was not tried; in a job `flowrl-mega train ... --dry-run` says which layers are used")


def what_is_there() -> tuple[str, str | None, str, list[str], dict[str, str]]:
    """Of .venv: torch and its CUDA, Python, the folders of NVIDIA's packages, and the version of each package."""
    if not venv_tool.PYTHON.exists():
        raise SetupError("there is no .venv; make setup TORCH=cuda makes it")
    return json.loads(run(str(venv_tool.PYTHON), "-c", SHOW).splitlines()[-1])


def check_torch(torch: str, cuda: str | None) -> None:
    if cuda is None:
        raise SetupError(
            f"torch {torch} in .venv is a CPU build, which Transformer Engine cannot use; make setup TORCH=cuda puts "
            "the CUDA build in its place, on a machine without GPU, too"
        )
    numbers = tuple(int(part) for part in torch.split("+")[0].split(".")[:2])
    if numbers < OLDEST_TORCH or int(cuda.split(".")[0]) != CUDA:
        raise SetupError(f"torch {torch} for CUDA {cuda} in .venv: torch 2.11 or newer for CUDA {CUDA} is needed")


def pinned() -> dict[str, str]:
    lines = PINS.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def source(folder: Path, version: str) -> Path:
    """The unpacked source of the torch part. pip runs its setup.py to learn its name, for which a stand-in for torch
    does: the real one takes seconds to import, and on some machines needs a driver."""
    name = f"{COMPILED.replace('-', '_')}-{version}"
    if (folder / name).is_dir():
        return folder / name
    stand_in = folder / "stand_in"
    for file, text in TORCH_STAND_IN.items():
        (stand_in / "torch" / file).parent.mkdir(parents=True, exist_ok=True)
        (stand_in / "torch" / file).write_text(text)
    with phase("its torch part's source"), environment(PYTHONPATH=str(stand_in)):
        download = ["download", "--quiet", "--no-deps", "--no-binary=:all:", "--no-build-isolation", "-d", str(folder)]
        run(str(venv_tool.PYTHON), "-m", "pip", *download, f"{COMPILED}=={version}")
    shutil.rmtree(stand_in)
    with tarfile.open(folder / f"{name}.tar.gz") as archive:
        archive.extractall(folder / "part", filter="data")
    (folder / "part" / name).replace(folder / name)
    return folder / name


def compile_for(folder: Path, sources: Path) -> None:
    """In a folder that stays, so that ninja goes on where a compilation was stopped. With the machine's CUDA toolkit
    only where PyTorch came without CUDA's headers, as a system's own may."""
    headers = [path for root in what_is_there()[3] for path in sorted(Path(root).glob("*/include"))]
    whole = str(int(any((path / "cuda_runtime_api.h").is_file() for path in headers)))
    jobs = os.environ.get("MAX_JOBS") or str(len(os.sched_getaffinity(0)))
    # Its expert-parallel part is of no use here.
    with environment(
        NVTE_PYTORCH_FORCE_BUILD="TRUE", NVTE_BUILD_USE_NVIDIA_WHEELS=whole, NVTE_WITH_NCCL_EP="0", MAX_JOBS=jobs,
        CPATH=os.pathsep.join(filter(None, [os.environ.get("CPATH"), *map(str, headers)])),
        PATH=os.pathsep.join([str(venv_tool.PYTHON.parent), os.environ.get("PATH", "")]),
    ):  # fmt: skip
        flags = ["wheel", "--no-deps", "--no-build-isolation", "-w", str(folder), str(sources)]
        run(str(venv_tool.PYTHON), "-m", "pip", *flags)


class environment:
    """In here this process's environment has these as well."""

    def __init__(self, **more: str) -> None:
        self.more = more

    def __enter__(self) -> None:
        self.before = {name: os.environ.get(name) for name in self.more}
        os.environ.update(self.more)

    def __exit__(self, *_: object) -> None:
        for name, value in self.before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


if __name__ == "__main__":
    main()
