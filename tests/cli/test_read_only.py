"""Run folders of a user without rights: what could not be written hours later is told at the start."""

from __future__ import annotations

import os
import shutil
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from jobs import write_config

from flowrl_mega import cli
from flowrl_mega.checkpoint.folder import checkpoints, remove_old
from flowrl_mega.config import ConfigError
from flowrl_mega.preflight import FOLDERS, RECORDS, _check_run_dir
from flowrl_mega.run_lock import FILE, run_lock

NOBODY = 65534


def as_nobody(folder: Path, work: Callable[[], None]) -> None:
    """Runs `work` in a child that is a user without rights, where this user may become one; `folder` is that user's."""
    root = os.geteuid() == 0
    if root:
        for place in (folder, *folder.rglob("*")):
            os.chown(place, NOBODY, NOBODY, follow_symlinks=False)
    child = os.fork()
    if child == 0:
        status = 1
        try:
            if root:
                os.setgroups([])
                os.setresgid(*[NOBODY] * 3)
                os.setresuid(*[NOBODY] * 3)
            work()
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    for place in folder.rglob("*"):
        if place.is_dir() and not place.is_symlink():
            place.chmod(0o755)  # for pytest to remove
    assert status == 0


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """Everybody can come here; other runs of pytest close the folder of all their tmp_path again."""
    with tempfile.TemporaryDirectory() as folder:
        Path(folder).chmod(0o755)
        yield Path(folder)


@pytest.fixture
def run_dir(open_folder: Path) -> Path:
    """A run folder with all that may be in one."""
    folder = open_folder / "above" / "run"
    for name in FOLDERS:
        (folder / name).mkdir(parents=True)
    for name in RECORDS:
        (folder / name).touch()
    return folder


# what is not as it should be in above/run -> the place that the message names, and what it is not
CASES: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "the run folder": (lambda run: run.chmod(0o555), ".", "folder that can be written"),
    "not to be looked into": (lambda run: run.chmod(0o666), ".", "folder that can be written"),
    "the folder above": (lambda run: run.parent.chmod(0o000), "..", "folder that can be written"),
    **{name: (lambda run, at=name: (run / at).chmod(0o555), name, "folder that can be written") for name in FOLDERS},
    "unreadable checkpoints": (  # would count as none, and the run begin again
        lambda run: (run / "checkpoints").chmod(0o333), "checkpoints", "folder that can be written",
    ),
    "checkpoints on a disk that is gone": (
        lambda run: ((run / "checkpoints").rmdir(), (run / "checkpoints").symlink_to("/no/such")),
        "checkpoints", "folder that can be written",
    ),
    **{name: (lambda run, at=name: (run / at).chmod(0o222), name, "file that can be read") for name in RECORDS},
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_refused_before_anything_is_written(case: str, run_dir: Path, open_folder: Path) -> None:
    spoil, place, words = CASES[case]
    named = os.path.normpath(run_dir / place)

    def work() -> None:
        spoil(run_dir)
        with pytest.raises(ConfigError) as refused:
            _check_run_dir(run_dir, "auto", None)
        assert f"run_dir = {str(run_dir)!r}: {named} is no {words}; choose another" in str(refused.value)

    as_nobody(open_folder, work)


def test_what_needs_no_rights(run_dir: Path, open_folder: Path) -> None:
    """Records that cannot be written are replaced as a whole; and what is not there yet can be made."""

    def work() -> None:
        for name in RECORDS:
            (run_dir / name).chmod(0o444)
        _check_run_dir(run_dir, "auto", None)
        _check_run_dir(run_dir / "not" / "yet", "auto", None)

    as_nobody(open_folder, work)


@pytest.mark.parametrize("mode", [0o555, 0o444, 0o000])
@pytest.mark.parametrize("place", [".", "new", "new/below"])
def test_the_lock(mode: int, place: str, open_folder: Path) -> None:
    closed = open_folder / "closed"
    closed.mkdir()

    def work() -> None:
        closed.chmod(mode)
        run_dir = closed / place
        with pytest.raises(ConfigError) as refused, run_lock(run_dir):
            pass
        assert str(refused.value).startswith(f"run_dir = {str(run_dir)!r}: cannot be written (Permission denied)")
        closed.chmod(0o755)
        assert os.listdir(closed) == []

    as_nobody(open_folder, work)


def test_another_users_lock(run_dir: Path, open_folder: Path) -> None:
    """It can be read, and a dead one replaced: the folder is what must be writable."""
    (run_dir / FILE).write_text("")
    (run_dir / FILE).chmod(0o000)

    def work() -> None:
        with pytest.raises(ConfigError, match=r"cannot be written \(Permission denied\)"), run_lock(run_dir):
            pass

    as_nobody(open_folder, work)
    assert (run_dir / FILE).exists()


def test_a_write_protected_checkpoint_is_kept(run_dir: Path, open_folder: Path) -> None:
    """Others go as always; removing it would have ended the run after its next save."""

    def work() -> None:
        for step in (1, 2, 3, 4):
            (run_dir / "checkpoints" / f"step_{step}").mkdir()
            (run_dir / "checkpoints" / f"step_{step}" / "weights").touch()
        (run_dir / "checkpoints" / "step_2").chmod(0o555)
        remove_old(run_dir, 1)
        assert [path.name for path in checkpoints(run_dir)] == ["step_2", "step_4"]
        assert (run_dir / "checkpoints" / "step_2" / "weights").exists()

    as_nobody(open_folder, work)


@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["ablate", "--vary=objective.beta=1,2"]])
def test_one_message(command: list[str], model: Path, open_folder: Path) -> None:
    mine = Path(shutil.copytree(model, open_folder / "model"))
    config = write_config(open_folder, mine, ops={"backend": "torch"})
    (open_folder / "run").mkdir()
    said = open_folder / "said"
    for place in (mine, *mine.iterdir()):
        place.chmod(0o755)

    def work() -> None:
        (open_folder / "run").chmod(0o555)
        with open(said, "w") as file, redirect_stderr(file):
            assert cli.main([command[0], str(config), *command[1:]]) == 2
        assert os.listdir(open_folder / "run") == []

    as_nobody(open_folder, work)
    assert said.read_text().startswith(f"flowrl-mega: run_dir = {str(open_folder / 'run')!r}: ")
    assert said.read_text().count("\n") == 1
