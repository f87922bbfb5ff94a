"""Make .venv, or bring it up to date: `make setup` runs this with the interpreter that .venv shall have.

Needs the standard library only. What is installed comes from requirements/*.txt, which pin everything exactly and are
installed with --no-deps, so nothing can bring in another torch. .venv/setup.json remembers what was installed from
which lists; only a list that changed is installed again, and a change of interpreter or torch starts a new .venv.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "setup.json"
LOG = VENV / "setup.log"
TORCH_KINDS = ("auto", "cpu", "cuda", "system")
OLDEST_SYSTEM_TORCH = (2, 11)
UV = "uv==0.13.9"

RUNTIME, DEV, TORCH = "requirements/runtime.txt", "requirements/dev.txt", "requirements/torch.txt"
PROJECT = ("pyproject.toml", "setup.py")


class SetupError(Exception):
    """What failed and how to go on, for the user."""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Make .venv, or bring it up to date.")
    parser.add_argument("--torch", choices=TORCH_KINDS, help="which torch; remembered (default: auto)")
    parser.add_argument("--extra", action="append", default=[], metavar="NAME", help="also requirements/NAME.txt")
    return parser


def main() -> None:
    args = parser().parse_args()
    try:
        set_up(args.torch, [f"requirements/{name}.txt" for name in args.extra])
    except SetupError as error:
        sys.exit(f"setup: {error}" + (f"\nAll output: {LOG.relative_to(ROOT)}" if LOG.exists() else ""))


def set_up(torch: str | None, extras: list[str]) -> None:
    """Install what .venv lacks of the base lists and `extras`; `torch` None repeats the choice made before."""
    stamp = read_stamp()
    asked = torch or stamp.get("asked", "auto")
    kind = torch_kind(asked, stamp.get("torch"))
    identity = {"root": str(ROOT), "python": "{}.{}".format(*sys.version_info[:2]), "torch": kind}
    usable = PYTHON.exists() and all(stamp.get(key) == value for key, value in identity.items())

    lists = [RUNTIME, DEV, TORCH, *extras, *PROJECT]
    hashes = {name: hashlib.sha256((ROOT / name).read_bytes()).hexdigest() for name in lists}
    installed = stamp["installed"] if usable else {}
    missing = [name for name in lists if installed.get(name) != hashes[name]]
    if not missing:
        print(".venv is up to date")
        return

    if not usable:
        with phase(f"new .venv: Python {identity['python']}, torch {kind}"):
            make_venv(system_site=kind == "system")
    # Until the end .venv must not pass for complete; a new one has no stamp yet, so a choice that fails is not kept.
    kept = {name: digest for name, digest in installed.items() if name not in missing}
    if usable:
        write_stamp({**identity, "asked": asked, "installed": kept})
    install(missing, kind)
    write_stamp({**identity, "asked": asked, "installed": {**kept, **hashes}})


def install(missing: list[str], kind: str) -> None:
    """Install the lists named in `missing`: torch, the one that may not be had, then packages, then the project."""
    if TORCH in missing:
        with phase(f"torch ({kind})"):
            install_torch(kind)
            check_torch(kind)
    for name in missing:
        if name not in (TORCH, *PROJECT):
            with phase(f"{Path(name).stem} packages"):
                pip("--no-deps", "--ignore-requires-python", "-r", str(ROOT / name))
    if any(name in missing for name in PROJECT):
        with phase("flowrl-mega"):
            pip("--no-deps", "-e", str(ROOT))
    with phase("bytecode"):
        compile_all()
    if TORCH in missing or any(name in missing for name in PROJECT):
        build_csrc()


def build_csrc() -> None:
    """Ahead of first use. All works without, only slower, so a failure does not stop the set-up."""
    try:
        with phase("csrc"):
            run(str(PYTHON), "-m", "flowrl_mega.ops")
    except SetupError as error:
        why = str(error).removeprefix("error: ")
        print(f"warning: csrc was not built, so pure torch takes its place (to try again: make build): {why}")


def torch_kind(asked: str, previous: str | None) -> str:
    """cpu, cuda or system. auto keeps CUDA on a machine without GPU (a cluster's login node), where it works."""
    if asked != "auto":
        return asked
    return "cuda" if previous == "cuda" or has_gpu() else "cpu"


def has_gpu() -> bool:
    if not shutil.which("nvidia-smi"):
        return False
    try:
        return subprocess.run(["nvidia-smi", "-L"], capture_output=True, timeout=60).returncode == 0
    except subprocess.TimeoutExpired:
        return False


def make_venv(system_site: bool) -> None:
    # This script may itself run in the .venv to be replaced: the new one is made with the interpreter under it.
    base = getattr(sys, "_base_executable", sys.executable)
    shutil.rmtree(VENV, ignore_errors=True)
    command = [base, "-m", "venv", *(["--system-site-packages"] if system_site else []), str(VENV)]
    result = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if result.returncode:
        raise SetupError(
            f"{base} cannot make a virtual environment:\n{result.stdout.strip()}\n"
            "On Debian and Ubuntu install python3-venv, or name another interpreter: make setup PYTHON=python3.12"
        )


def install_torch(kind: str) -> None:
    """With the few packages that torch asks for, at the versions that runtime.txt pins."""
    pin = torch_pin()
    if kind == "cuda":
        pip("-c", str(ROOT / RUNTIME), pin)
    elif kind == "cpu":
        try:
            pip("-c", str(ROOT / RUNTIME), f"{pin}+cpu")
        except SetupError as error:
            install_cpu_torch_with_uv(pin, error)


def install_cpu_torch_with_uv(pin: str, pip_error: SetupError) -> None:
    """uv knows where PyTorch keeps its CPU builds, which pip does not unless it is told."""
    try:
        pip(UV)
        uv = [str(VENV / "bin" / "uv"), "pip", "install", "--quiet", "--python", str(PYTHON)]
        run(*uv, "-c", str(ROOT / RUNTIME), "--torch-backend=cpu", pin)
    except SetupError as uv_error:
        raise SetupError(
            f"no CPU build of {pin} for Python {sys.version_info[0]}.{sys.version_info[1]} could be had.\n"
            f"  pip: {pip_error}\n  uv:  {uv_error}\n"
            "Go on with one of\n"
            "  make setup PYTHON=python3.11    another interpreter\n"
            "  make setup TORCH=cuda           the CUDA build, several GB, which also runs on CPU\n"
            "  make setup TORCH=system         the torch that the interpreter already has\n"
            "or put the wheel into a folder and tell pip: pip config set global.find-links FOLDER"
        ) from None


def torch_pin() -> str:
    return next(line for line in (ROOT / TORCH).read_text().split("\n") if line.startswith("torch=="))


def check_torch(kind: str) -> None:
    """Refuse a torch that is not the kind asked for, before anything depends on it."""
    show = "import torch; print(torch.__version__, torch.version.cuda)"
    try:
        version, cuda = run(str(PYTHON), "-c", show).split()[-2:]
    except SetupError as error:
        raise SetupError(f"torch cannot be imported in .venv: {error}") from None
    if (cuda == "None") != (kind == "cpu"):
        found = "a CPU build" if cuda == "None" else f"a build for CUDA {cuda}"
        raise SetupError(f"torch {version} is {found}, but the set-up is for TORCH={kind}; name another TORCH=")
    if kind == "system" and tuple(int(part) for part in version.split(".")[:2]) < OLDEST_SYSTEM_TORCH:
        raise SetupError(f"the system's torch {version} is too old: 2.11 or newer is needed")


def pip(*args: str) -> None:
    """No build isolation: it would bring a setuptools of its own, unpinned. All is compiled in one go afterwards."""
    command = [str(PYTHON), "-m", "pip", "install", "--disable-pip-version-check"]
    run(*command, "--no-compile", "--no-build-isolation", *args)


def compile_all(folder: Path | None = None) -> None:
    """What is in `folder` (the environment), on all cores; what is compiled already is passed over. Without it every
    rank and server would compile torch and Megatron at each start (50 s here) where Python is told not to keep what it
    compiled, as in many containers."""
    command = [str(PYTHON), "-m", "compileall", "-q", "-j", "0", str(folder or VENV / "lib")]
    with suppress(SetupError):  # packages ship files that are no Python, for tests of theirs
        run(*command)


def run(*command: str) -> str:
    """Run `command`, its output going to .venv/setup.log; its standard output, or SetupError with its last error."""
    # Some cluster containers set this to hold back releases that the lists here pin.
    env = {name: value for name, value in os.environ.items() if name != "PIP_CONSTRAINT"}
    result = subprocess.run(command, capture_output=True, text=True, env=env)
    output = result.stdout + result.stderr
    with LOG.open("a") as log:
        log.write(f"$ {' '.join(command)}\n{output}\n")
    if result.returncode:
        lines = [line.strip() for line in output.splitlines() if line.strip()] or [f"exit code {result.returncode}"]
        errors = [at for at, line in enumerate(lines) if line.lower().startswith("error")] or [len(lines) - 1]
        raise SetupError("; ".join(lines[errors[-1] :][:2]))
    return result.stdout


@contextmanager
def phase(name: str) -> Iterator[None]:
    """Say what is going on, then how many seconds it took."""
    print(f"{name} ...", end="", flush=True)
    began = time.monotonic()
    try:
        yield
    except SetupError:
        print(" failed", flush=True)
        raise
    print(f" {time.monotonic() - began:.0f} s", flush=True)


def read_stamp() -> dict:
    try:
        return json.loads(STAMP.read_text())
    except (OSError, ValueError):
        return {}


def write_stamp(stamp: dict) -> None:
    STAMP.write_text(json.dumps(stamp, indent=1) + "\n")


if __name__ == "__main__":
    main()
