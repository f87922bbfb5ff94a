"""Unpack Transformer Engine's Python for tests that emulate its native part: `make setup-te-emulation`.

A wheel of 1 MB without libraries. It lies in the cache folder, under a key of its list, and .te-emulation in the clone
is a link to it: not in .venv, where the product would find it. Needs the standard library only.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

from user_cache import cache, key, link, locked

import setup as venv_tool
from setup import ROOT, SetupError, phase

LINK = ROOT / ".te-emulation"
PINS = ROOT / "requirements" / "te_emulation.txt"
COMPLETE = "setup.json"  # made last


def parser() -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description="Make .te-emulation, Transformer Engine's Python for tests.")


def main() -> None:
    parser().parse_args()
    try:
        link(LINK, set_up())
    except SetupError as error:
        sys.exit(f"setup-te-emulation: {error}")


def set_up() -> Path:
    """The folder, made where there is none."""
    folder = cache() / f"te-emulation-{key(PINS.read_text(), sys.version, sys.platform)}"
    with locked(folder.with_suffix(".lock"), "Transformer Engine's emulation"):
        if (folder / COMPLETE).exists():
            print(f"Transformer Engine's Python is up to date in {folder}")
            return folder
        venv_tool.LOG = folder.with_suffix(".log")
        shutil.rmtree(folder, ignore_errors=True)  # what a broken download has left
        with phase(folder.name):
            venv_tool.pip("--no-deps", "--only-binary=:all:", "--target", str(folder), "-r", str(PINS))
            venv_tool.compile_all(folder)
        (folder / COMPLETE).write_text("{}\n")
    return folder


if __name__ == "__main__":
    main()
