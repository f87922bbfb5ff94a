"""Where convert_ckpt writes: folders that cannot be made, full disks, interruptions. Nothing half written is left."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from convert_jobs import COMMANDS, Example, Forked, fail, in_the_middle, listing, refused, require_one_message, run

Capture = pytest.CaptureFixture[str]
Patch = pytest.MonkeyPatch

pytestmark = [pytest.mark.slow, pytest.mark.parametrize("command", COMMANDS)]


# what is there already, where to, what the message must contain
OUT: dict[str, tuple[Callable[[], Any], str, list[str]]] = {
    "a folder": (lambda: Path("out").mkdir(), "out", ["--out = 'out': exists already", "remove it or choose another"]),
    "a file": (lambda: Path("out").touch(), "out", ["--out = 'out': exists already", "remove it or choose another"]),
    "a link": (lambda: Path("out").symlink_to("no"), "out/", ["--out = 'out': exists already", "choose another"]),
    "nothing": (list, "", ["--out = '.': exists already", "choose another"]),
    "below a file": (lambda: Path("x").touch(), "x/y/out", ["--out = 'x/y/out'", "/x is no folder", "another"]),
    "below a link": (lambda: Path("x").symlink_to("no"), "x/out", ["--out = 'x/out'", "/x is no folder", "another"]),
    "no name": (lambda: Path("x").mkdir(), "x/..", ["--out = 'x/..'", "choose another"]),
    "no name of nothing": (list, "x/..", ["--out = 'x/..'", "is no folder; choose another"]),
    "a long name": (list, "x/" + 255 * "y", ["--out = 'x/yyy", "File name too long", "choose another"]),
    "a longer name": (list, "x/" + 300 * "y", ["--out = 'x/yyy", "File name too long", "choose another"]),
}  # fmt: skip


@pytest.mark.parametrize("case", OUT)
def test_out_that_cannot_be_made(
    command: str, case: str, example: Example, work: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    before, out, parts = OUT[case]
    monkeypatch.chdir(work)
    before()
    message = refused(capfd, work, *example.arguments(command, out))
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("out", ["out/", "new/folders/out"])
def test_a_relative_path(command: str, out: str, example: Example, work: Path, monkeypatch: Patch) -> None:
    """And the folders on the way to it are made."""
    monkeypatch.chdir(work)
    assert run(*example.arguments(command, out)) == 0
    example.require_made(command, work / out)
    assert not list(work.rglob(".out*"))


def test_inside_the_folder_that_is_read(command: str, example: Example, work: Path) -> None:
    """Where models are kept together; what lay there stays as it was."""
    name, folder = example.inputs[command]
    shutil.copytree(folder, work / "input")
    before, out = listing(work), work / "input" / "out"
    assert run(command, name, work / "input", "--out", out) == 0
    example.require_made(command, out)
    assert [entry for entry in listing(work) if out not in (entry[0], *entry[0].parents)] == before


def test_a_hidden_neighbour(command: str, example: Example, work: Path) -> None:
    """--out git in a repository, or --out cache at home, must not take .git or .cache for something unfinished."""
    (work / ".out").mkdir()
    (work / ".out" / "precious").write_text("x")
    assert run(*example.arguments(command, work / "out")) == 0
    assert (work / ".out" / "precious").read_text() == "x"


def test_no_space_is_said_before_anything_is_written(
    command: str, example: Example, work: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=4_800_000))
    monkeypatch.setattr(Path, "mkdir", partial(fail, AssertionError("written")))
    message = refused(capfd, work, *example.arguments(command, work / "out"))
    assert f"--out = '{work}/out': needs 0.00 GB, and {work} has 0.00 GB left; free some or choose" in message


def test_a_folder_that_may_not_be_written_to(
    command: str, example: Example, work: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    """Root may write everywhere, so the system's answer is made up: before the first byte, and at it."""
    error = PermissionError(errno.EACCES, "Permission denied", ".out")
    for owner, name, answer in ((os, "access", lambda *args: False), (Path, "mkdir", partial(fail, error))):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, answer)
            message = refused(capfd, work, *example.arguments(command, work / "out"))
        assert f"--out = '{work}/out'" in message and "cannot be written" in message and "choose another" in message


def test_a_file_that_may_not_be_read(
    command: str, example: Example, work: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    monkeypatch.setattr(Path, "read_text", partial(fail, PermissionError(errno.EACCES, "Permission denied", "x.json")))
    assert "Permission denied: 'x.json'" in refused(capfd, work, *example.arguments(command, work / "out"))


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "disk").mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(tmp_path / "disk")]
    if os.getuid() or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs root that may mount a small disk")
    yield tmp_path / "disk"
    subprocess.run(["umount", str(tmp_path / "disk")], check=True)


def test_a_disk_that_is_full_in_the_middle(
    command: str, example: Example, small_disk: Path, monkeypatch: Patch, capfd: Capture
) -> None:
    """Someone else may fill it meanwhile: here there seemed to be room, and there is not."""
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1 << 40))
    message = refused(capfd, small_disk, *example.arguments(command, small_disk / "new" / "out"))
    assert f"--out = '{small_disk}/new/out': cannot be written (No space left on device)" in message


@pytest.mark.parametrize("limit", [1000, 1_000_000])
def test_a_file_that_must_not_grow(command: str, limit: int, example: Example, work: Path, tmp_path: Path) -> None:
    """A limit that needs no root: the system refuses to write on, at the first tensor or in the middle."""
    limited = partial(resource.setrlimit, resource.RLIMIT_FSIZE, (limit, limit))
    job = Forked(example.arguments(command, work / "new" / "out"), tmp_path / "log", before=limited)
    assert job.codes() == [2]
    require_one_message(job.log.read_text())
    assert f"--out = '{work}/new/out': cannot be written (File too large); choose another" in job.log.read_text()
    assert listing(work) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_interrupted(command: str, number: int, code: int, example: Example, work: Path, tmp_path: Path) -> None:
    """In the middle of a file, also where torch's C++ is what writes it."""
    before = partial(in_the_middle, partial(signal.raise_signal, number))
    job = Forked(example.arguments(command, work / "new" / "out"), tmp_path / "log", before=before)
    assert job.codes() == [code]
    assert job.log.read_text() == "" and listing(work) == []


def test_killed(command: str, example: Example, work: Path, tmp_path: Path) -> None:
    """What nobody can catch leaves a hidden folder, which the next run clears away."""
    before = partial(in_the_middle, partial(signal.raise_signal, signal.SIGKILL))
    job = Forked(example.arguments(command, work / "out"), tmp_path / "log", before=before)
    assert job.codes() == [-signal.SIGKILL]
    (left,) = work.iterdir()
    assert left.name == ".out.partial" and listing(left)
    assert run(*example.arguments(command, work / "out")) == 0
    assert [path.name for path in work.iterdir()] == ["out"]
    example.require_made(command, work / "out")
