"""The suite itself: what a folder's tests import, and two halves of them side by side."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPO = Path(__file__).parents[1]


def test_a_folder_imports_only_what_it_needs():
    """Torch and Megatron take seconds to import: the settings' tests, which need neither, do not wait for them."""
    code = (
        "import sys, pytest\n"
        "status = pytest.main(['-q', '--collect-only', '-p', 'no:cacheprovider', 'tests/config'])\n"
        "print(status == 0, sorted({'torch', 'megatron', 'transformers'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True, timeout=240)
    assert done.stdout.splitlines()[-1:] == ["True []"], done.stdout + done.stderr


TESTS = """
import os, time, pytest

@pytest.mark.ranks
def test_of_ranks(): assert RANKS

def test_other(): assert OTHER

@pytest.mark.{marker}
def test_left_out(): assert False
"""


def side_by_side(folder: Path, source: str, *arguments: str, interrupt: bool = False) -> tuple[int, list[str]]:
    """Exit status and output of a copy of side_by_side.py beside one file of tests."""
    shutil.copy(REPO / "tests/side_by_side.py", folder)
    shutil.copy(REPO / "pyproject.toml", folder)  # the markers
    (folder / "test_two.py").write_text(source)
    command = [sys.executable, "side_by_side.py", *arguments]
    with subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, text=True) as run:
        if interrupt:
            end = time.monotonic() + 120
            while len(list(folder.glob("begun_*"))) < 2 and time.monotonic() < end:
                time.sleep(0.02)
            run.send_signal(signal.SIGINT)
        said = run.communicate(timeout=240)[0]
    return run.returncode, said.splitlines()


@pytest.mark.tools
@pytest.mark.parametrize(
    "ranks, other, arguments, code, last",
    [
        (True, True, [], 0, ["1 passed, 2 deselected", "1 passed, 2 deselected"]),
        (False, True, [], 1, ["1 failed, 2 deselected", "1 passed, 2 deselected"]),
        (True, False, [], 1, ["1 passed, 2 deselected", "1 failed, 2 deselected"]),
        (True, True, ["-k", "other"], 0, ["3 deselected", "1 passed, 2 deselected"]),
        (True, False, ["-k", "other"], 1, ["3 deselected", "1 failed, 2 deselected"]),
        (True, True, ["-k", "no_such"], 5, ["3 deselected", "3 deselected"]),
        (True, True, ["--no-such-option"], 4, None),
    ],
)
def test_two_halves(ranks, other, arguments, code, last, tmp_path):
    """Either half's failure is the whole's, with its traceback; pytest's own last lines are the last lines."""
    source = TESTS.format(marker="tools").replace("RANKS", str(ranks)).replace("OTHER", str(other))
    found, said = side_by_side(tmp_path, source, *arguments)
    assert found == code, said
    if last:
        assert [line.rpartition(" in ")[0] for line in said[-2:]] == last
    for name, passes in (("test_of_ranks", ranks), ("test_other", other)):
        assert any(f"FAILED test_two.py::{name}" in line for line in said) == (not passes)


@pytest.mark.tools
def test_an_interrupt_ends_both_halves(tmp_path):
    """Each tells what was done so far."""
    wait = "open(f'begun_{os.getpid()}', 'w').close() or time.sleep(600)"
    source = TESTS.format(marker="exact").replace("RANKS", wait).replace("OTHER", wait)
    code, said = side_by_side(tmp_path, source, interrupt=True)
    assert code == 2
    assert sum("KeyboardInterrupt" in line and "!!!" in line for line in said) == 2, said
