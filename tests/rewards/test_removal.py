"""A program's temporary folder, where no tmpfs goes with it."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from sandbox_watch import as_nobody, opened

from flowrl_mega.config import CodeSettings
from flowrl_mega.rewards.sandbox import client
from flowrl_mega.rewards.sandbox.client import Sandbox


@pytest.fixture
def remove(monkeypatch):
    monkeypatch.syspath_prepend(Path(client.__file__).parent)
    return importlib.import_module("removal").remove


@pytest.fixture
def top(tmp_path):
    folder = tmp_path / "program"
    folder.mkdir()
    return folder


def test_all_of_it_goes(remove, top):
    """Files, links, fifos, names that are no text; what lies beside it stays."""
    (top.parent / "beside").mkdir()
    (top.parent / "beside" / "file").write_text("x")
    (top / "a" / "b").mkdir(parents=True)
    (top / "a" / "b" / "file").write_text("x")
    (top / "a" / "link").symlink_to(top.parent / "beside")
    (top / "nowhere").symlink_to("/nowhere")
    os.mkfifo(top / "fifo")
    os.mkdir(os.fsencode(top) + b"/\xff")
    remove(str(top))
    assert os.listdir(top.parent) == ["beside"]
    assert (top.parent / "beside" / "file").read_text() == "x"


def test_a_link_in_its_place(remove, top):
    """Which a program can make where all may write: only the link goes, and no mode beyond it changes."""
    (top / "file").write_text("x")
    top.chmod(0o755)
    link = top.parent / "link"
    link.symlink_to(top)
    remove(str(link))
    assert not link.is_symlink() and (top / "file").read_text() == "x" and top.stat().st_mode & 0o777 == 0o755


def test_a_folder_that_has_gone(remove, top):
    top.rmdir()
    remove(str(top))


MANY = "import os\nfor _ in range(1100):\n    os.mkdir('deeper')\n    os.chdir('deeper')\nopen('file', 'w').write('x')"
CLOSED = "import os\nos.makedirs('a/b')\nos.chmod('a/b', 0)\nos.chmod('a', 0)\nos.chmod('.', 0)"
LIMITS = CodeSettings(wall_s=60.0, cpu_s=20, isolation="process")


def leaves_nothing(sandbox, source):
    """A program in such a folder gets its verdict, and its folder goes."""
    outcome = sandbox.run(f"import os\nprint(os.getcwd(), flush=True)\n{source}", "")
    assert (outcome.end, outcome.code) == ("exit", 0), outcome
    assert not os.path.lexists(outcome.stdout.strip())


@pytest.mark.slow
@pytest.mark.parametrize("source", [MANY, CLOSED], ids=["deep", "closed"])
def test_folders_of_programs(source):
    """One that is deeper than a function may call itself, or a path be long; one whose modes forbid all."""
    with opened(LIMITS, "process") as sandbox:
        leaves_nothing(sandbox, source)


@pytest.mark.slow
def test_folders_of_programs_without_a_user_of_their_own(tmp_path, monkeypatch):
    def work(settings):
        sandbox = Sandbox(LIMITS.model_copy(update=settings), "process")
        leaves_nothing(sandbox, CLOSED)
        sandbox.close()

    as_nobody(work, tmp_path, monkeypatch)
