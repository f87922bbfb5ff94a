"""The file lock, between real processes."""

from __future__ import annotations

import errno
import fcntl
import subprocess
import sys
from pathlib import Path

import pytest

from flowrl_mega.file_lock import locked

HOLDER = """
import sys
from pathlib import Path
from flowrl_mega.file_lock import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""


def is_held(path: Path) -> bool:
    """Whether somebody holds it alone: asked of the kernel, not of our own code."""
    with path.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False


@pytest.mark.parametrize("end", ["leaves the block", "is killed"])
def test_held_until_the_holder_is_gone(end: str, tmp_path: Path) -> None:
    path = tmp_path / "lock"
    command = [sys.executable, "-c", HOLDER, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout and holder.stdout.readline() == b"held\n"
        assert is_held(path)
        if end == "is killed":
            holder.kill()
    assert not is_held(path)
    with locked(path):
        assert is_held(path)


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lustre without -o flock says ENOSYS: the block runs all the same. Any other error is told."""
    code = errno.ENOSYS

    def flock(file: object, operation: int) -> None:
        raise OSError(code, "no")

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path / "lock"):
        code = errno.EIO
    with pytest.raises(OSError, match="no"), locked(tmp_path / "lock"):
        pass
