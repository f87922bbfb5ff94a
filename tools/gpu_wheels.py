"""What tools/gpu_wheels.sh does: wheels for Python 3.12 on x86_64 Linux, for a machine that has PyTorch for CUDA 13.

The machine is expected to have torch, numpy, transformers and what these need. The versions are those of requirements/.
What is in the folder already is not fetched again. pip checks the index's hash of everything that it downloads.
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import te_slim
from user_cache import cache

REPO = Path(__file__).resolve().parent.parent
LIMIT_MIB = 60
TAGS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")  # older ones run there as well
PLATFORM = ["--python-version=312", "--only-binary=:all:", *(f"--platform={tag}" for tag in TAGS)]
ARCH, TORCH = 90, "2.11."  # Hopper, and the PyTorch for which alone compiled code is taken along
TE_VERSION = "2.20.2"
# Imported by the package and by its tests; of those that such a machine has, gpu_check.py leaves the machine's own.
PINNED = (
    "megatron-core aiohttp aiohappyeyeballs aiosignal annotated-types attrs einops frozenlist idna iniconfig multidict "
    "packaging pluggy propcache psutil pydantic pydantic-core pygments pytest pytest-timeout pyyaml safetensors tqdm "
    "typing-extensions typing-inspection yarl"
).split()
# Transformer Engine asks for nvidia-cudnn-frontend, onnx and onnxscript too: it imports the first in kernels for newer
# architectures, the others to export models.
TE_WHEELS = [f"transformer-engine=={TE_VERSION}", "nvdlfw-inspect==0.2.2"]
HEADERS = ["nvidia-cuda-crt==13.0.88", "nvidia-cuda-cccl==13.0.85"]  # which those of nvidia-cuda-runtime include
TE_CORE, TE_TORCH = f"transformer-engine-cu13=={TE_VERSION}", f"transformer-engine-torch=={TE_VERSION}"
# Its setup.py asks torch for its CUDA version before it tells its own name, and pip asks for the name.
TORCH_STAND_IN = {
    "__init__.py": "from torch import version\n",
    "version.py": 'cuda = "13.0"\n',
    "utils/__init__.py": "",
    "utils/cpp_extension.py": "from setuptools import Extension as CppExtension\n"
    "from setuptools.command.build_ext import build_ext as BuildExtension\n",
}


def main() -> None:
    folder: Path = parser().parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    pins = read_pins(REPO / "requirements")
    for requirement in [f"{name}=={pins[name]}" for name in PINNED] + TE_WHEELS + HEADERS:
        if not present(folder, requirement):
            download(requirement, folder, PLATFORM)
    if not compiled_te_torch(folder) and not present(folder, TE_TORCH):
        source_of_te_torch(folder)
    if not present(folder, TE_CORE):
        slimmed_core(folder)
    print(libraries(folder))
    files = sorted(folder.iterdir(), key=lambda file: -file.stat().st_size)
    for file in files:
        print(f"{file.stat().st_size / 2**20:8.2f} MiB  {file.name}")
    total = sum(file.stat().st_size for file in files) / 2**20
    print(f"{total:8.2f} MiB  in {folder}")
    if total > LIMIT_MIB:
        sys.exit(f"gpu_wheels: {total:.1f} MiB is more than the {LIMIT_MIB} MiB that may be carried")


def libraries(folder: Path) -> str:
    """csrc, built here for what the GPU machine has: any Python and any PyTorch from 2.11 on can load it. What became
    of it, in words."""
    sys.path.insert(0, str(REPO))
    try:
        from flowrl_mega.ops import build

        for kind in build.KINDS:
            built = build.cached(kind, build.sources(), build.default_cache())
            for path in (built, built.with_suffix(".json")):
                shutil.copy(path, folder / f"{kind}{path.suffix}")
    except (ImportError, build.BuildError) as error:
        return f"csrc will be built on the GPU machine (make setup TORCH=cuda lets it be built here): {error}"
    return "csrc is built"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="tools/gpu_wheels.sh",
        description="Download what a GPU machine without network needs beside PyTorch: at most 60 MiB of wheels.",
    )
    parser.add_argument(
        "folder", nargs="?", type=Path, default=REPO / "build" / "gpu_wheels", help="default: build/gpu_wheels"
    )
    return parser


def read_pins(folder: Path) -> dict[str, str]:
    lines = [line for name in ("runtime", "dev") for line in (folder / f"{name}.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def present(folder: Path, requirement: str) -> bool:
    """Whether the folder has this version of it. What is not complete has another suffix."""
    name, version = requirement.split("==")
    prefix = f"{name.replace('-', '_')}-{version}".lower()
    starts = (f"{prefix}-", f"{prefix}.tar.gz")
    return any(f.name.lower().startswith(starts) and f.suffix in (".whl", ".gz") for f in folder.iterdir())


def download(requirement: str, folder: Path, options: list[str], environment: dict[str, str] | None = None) -> None:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", *options, "-d", str(folder)]
    done = subprocess.run([*command, requirement], env=os.environ | (environment or {}))
    if done.returncode:
        sys.exit(f"gpu_wheels: pip could not download {requirement} (its message is above)")


def compiled_te_torch(folder: Path) -> bool:
    """Whether Transformer Engine's torch part is there, or `make setup-te` has compiled it here for such a machine."""
    name = f"{TE_TORCH.replace('-', '_').replace('==', '-')}-cp312-cp312-linux_x86_64.whl"
    for wheel in cache().glob(f"te-{TORCH}*/{name}"):
        shutil.copy(wheel, folder)
    return (folder / name).is_file()


def source_of_te_torch(folder: Path) -> None:
    """The source of Transformer Engine's torch part, to be compiled against the GPU machine's torch: minutes there.

    pip runs its setup.py to learn its name, so that needs setuptools and wheel beside the stand-in for torch.
    """
    with tempfile.TemporaryDirectory() as path:
        for name, text in TORCH_STAND_IN.items():
            file = Path(path, "torch", name)
            file.parent.mkdir(parents=True, exist_ok=True)
            file.write_text(text)
        tools = ["install", "--quiet", "--target", path, "setuptools==84.2.1", "wheel", "packaging"]
        subprocess.run([sys.executable, "-m", "pip", *tools], check=True)
        download(TE_TORCH, folder, ["--no-binary=:all:", "--no-build-isolation"], {"PYTHONPATH": path})


def slimmed_core(folder: Path) -> None:
    """Transformer Engine's core library for one architecture; the whole wheel stays beside the folder's files only as
    long as that takes."""
    with tempfile.TemporaryDirectory(dir=folder.parent) as path:
        download(TE_CORE, Path(path), PLATFORM)
        (wheel,) = Path(path).iterdir()
        te_slim.slim_wheel(wheel, folder, ARCH)


if __name__ == "__main__":
    main()
