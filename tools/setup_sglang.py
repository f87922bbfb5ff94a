"""Make the virtual environment that SGLang's servers run in, or find the one made before: `make setup-sglang`.

It is not .venv, as SGLang pins another torch and transformers. It takes 3 GB and minutes, so all clones of one user
share it: it lies in the cache folder, under a key of what it was made from, and .venv-sglang in the clone is a link to
it. `rollout.python` is to name the interpreter that this prints. Needs the standard library only.

Without a GPU, requirements/sglang.txt pins everything. With one, SGLang's own requirements choose its kernels.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from user_cache import cache, key, link, locked

import setup as venv_tool
from setup import ROOT, SetupError, phase, pip

LINK = ROOT / ".venv-sglang"
PINS = ROOT / "requirements" / "sglang.txt"
NCCL = "nvidia-nccl-cu13"
FOR_GPU = ("sglang", "sglang-router")  # what is asked for by name where there is a GPU, at the versions in PINS


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make .venv-sglang, which SGLang's servers run in.")
    parser.add_argument("--torch", default="auto", choices=["auto", "cpu", "cuda"], help="auto: cuda where a GPU is")
    return parser


def main() -> None:
    asked = parser().parse_args().torch
    kind = ("cuda" if venv_tool.has_gpu() else "cpu") if asked == "auto" else asked
    try:
        folder = set_up(kind)
        link(LINK, folder)
        if kind == "cuda":
            share_nccl(folder / "bin" / "python", ROOT / ".venv" / "bin" / "python")
    except SetupError as error:
        log = f"\nAll output: {venv_tool.LOG}" if venv_tool.LOG.exists() else ""
        sys.exit(f"setup-sglang: {error}{log}")
    print(LINK / "bin" / "python")


def set_up(kind: str) -> Path:
    """The folder of a complete environment for `kind` (cpu or cuda), made where there is none."""
    folder = cache() / f"sglang-{key(PINS.read_text(), kind, sys.version, sys.platform)}"
    with locked(folder.with_suffix(".lock"), "SGLang"):
        # From here on setup.py's helpers work on this environment.
        venv_tool.VENV, venv_tool.PYTHON, venv_tool.LOG = folder, folder / "bin" / "python", folder / "setup.log"
        stamp = folder / "setup.json"
        if stamp.exists() and venv_tool.PYTHON.exists():  # the interpreter under it may have been removed since
            print(f"SGLang is up to date in {folder}")
            return folder
        with phase(f"new {folder.name}: Python {'.'.join(map(str, sys.version_info[:2]))}, for {kind}"):
            venv_tool.make_venv(system_site=False)
        install(kind)
        with phase("bytecode"):
            venv_tool.compile_all()
        stamp.write_text(json.dumps({"kind": kind, "sglang": pinned()["sglang"]}) + "\n")
    return folder


def install(kind: str) -> None:
    if kind == "cuda":
        with phase("sglang and what it asks for"):
            pip(*(f"{name}=={pinned()[name]}" for name in FOR_GPU))
        return
    with phase("torch (cpu)"):
        venv_tool.install_torch("cpu")
    with phase("sglang packages"):
        pip("--no-deps", "-r", str(PINS))  # which lists torch too: the build that is there satisfies it


def share_nccl(servers: Path, trainer: Path) -> None:
    """Give .venv the servers' NCCL: both broadcast weights in one communicator, which takes one version."""
    show = f"import importlib.metadata as m; print(*[d.version for d in m.distributions(name='{NCCL}')])"
    theirs, ours = (venv_tool.run(str(python), "-c", show).strip() for python in (servers, trainer))
    if theirs and ours and theirs != ours:
        venv_tool.PYTHON = trainer
        with phase(f"{NCCL} {theirs} for .venv, in place of {ours}"):
            pip("--no-deps", f"{NCCL}=={theirs}")


def pinned() -> dict[str, str]:
    lines = PINS.read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


if __name__ == "__main__":
    main()
