"""Every script that is meant to be run says with --help how, soon, and does nothing else."""

from __future__ import annotations

import os
import resource
import subprocess
from pathlib import Path

import pytest
from scripts import REPO, command_line, commands

pytestmark = pytest.mark.tools

CPU_S = 5


@pytest.mark.parametrize("script", commands(), ids=str)
def test_help_says_how_to_use_it_and_does_nothing_else(script: Path, tmp_path: Path) -> None:
    """CPU time, as the machine may be busy. The home folder and that for temporary files are the empty one too."""
    folders = {name: str(tmp_path) for name in ("HOME", "TMPDIR", "XDG_CACHE_HOME")}
    environment = {
        **os.environ,
        **folders,
        "PYTHONPATH": str(REPO),
        "PYTHONDONTWRITEBYTECODE": "1",
        "PIP_NO_INDEX": "1",
    }
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command_line(script), "--help"], cwd=tmp_path, env=environment, stdin=subprocess.DEVNULL,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    assert done.returncode == 0, done.stderr
    assert script.stem in done.stdout.splitlines()[0] and done.stdout.startswith("usage: "), "another program's usage"
    assert not done.stderr
    assert not list(tmp_path.iterdir())
    assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < CPU_S
