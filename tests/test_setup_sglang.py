"""SGLang's environment is made once for all clones, is never taken for complete before it is, and is found again."""

from __future__ import annotations

import fcntl
import importlib
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.tools

REPO = Path(__file__).resolve().parent.parent


class FakeSetup:
    """tools/setup_sglang.py on a small tree of its own; what it would have run is kept in `ran`."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        monkeypatch.syspath_prepend(str(REPO / "tools"))
        for name in ("setup", "user_cache", "setup_sglang"):
            monkeypatch.delitem(sys.modules, name, raising=False)
        self.tool = importlib.import_module("setup_sglang")
        self.ran: list[str] = []
        self.fail_on = ""
        (root / "sglang.txt").write_text("# all of it\ntorch==1.0\nsglang==2.0\nsglang-router==3.0\nelse==4.0\n")
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        self.tool.ROOT, self.tool.LINK, self.tool.PINS = root, root / ".venv-sglang", root / "sglang.txt"
        self.tool.pip = lambda *words: self.note(" ".join(words))
        self.tool.venv_tool.run = lambda *words: self.note(words[2])
        self.tool.venv_tool.install_torch = lambda kind: self.note(f"torch {kind}")
        self.tool.venv_tool.make_venv = self.make_venv

    def make_venv(self, system_site: bool) -> None:
        assert not system_site
        python = self.tool.venv_tool.PYTHON
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        self.note("venv")

    def note(self, what: str) -> None:
        if self.fail_on and self.fail_on in what:
            raise self.tool.SetupError("no network")
        self.ran.append(what)

    def __call__(self, kind: str = "cpu") -> tuple[Path, list[str]]:
        """The folder that one set-up gives, and what it runs."""
        self.ran = []
        return self.tool.set_up(kind), self.ran


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    yield FakeSetup(tmp_path, monkeypatch)
    for name in ("setup", "user_cache", "setup_sglang"):
        sys.modules.pop(name, None)


def test_it_is_made_once(setup: FakeSetup, tmp_path: Path):
    """torch first, as its CPU build may have to be looked for; then the pins with nothing beside them."""
    folder, ran = setup()
    assert ran == ["venv", "torch cpu", f"--no-deps -r {tmp_path / 'sglang.txt'}", "compileall"]
    assert folder.parent == tmp_path / "cache" / "flowrl-mega"
    assert setup() == (folder, [])


def test_with_a_gpu_sglang_chooses_its_kernels(setup: FakeSetup):
    """In a folder of its own: a home may be shared by machines with and without GPU."""
    cpu, _ = setup()
    folder, ran = setup("cuda")
    assert ran == ["venv", "sglang==2.0 sglang-router==3.0", "compileall"] and folder != cpu


def test_other_pins_make_another(setup: FakeSetup):
    """The old one stays: another clone may be at the old pins, and servers may be running from it."""
    first, _ = setup()
    pins = setup.tool.PINS
    pins.write_text(pins.read_text().replace("else==4.0", "else==5.0"))
    second, ran = setup()
    assert second != first and ran and first.exists()


def test_one_that_failed_is_made_anew(setup: FakeSetup):
    """What a broken download left behind must not pass for an environment."""
    setup.fail_on = "--no-deps"
    with pytest.raises(setup.tool.SetupError, match="no network"):
        setup()
    setup.fail_on = ""
    assert setup()[1][0] == "venv"
    assert setup()[1] == []


def test_two_at_once_wait_for_each_other(setup: FakeSetup):
    """Two clones, or CI beside a user, must not write into one environment."""
    held = []

    def make_venv(system_site: bool) -> None:
        setup.make_venv(system_site)
        lock = setup.tool.venv_tool.VENV.with_suffix(".lock")
        with lock.open("w") as other:
            try:
                fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                held.append(lock)

    setup.tool.venv_tool.make_venv = make_venv
    setup()
    assert len(held) == 1


def test_the_clone_links_to_it(setup: FakeSetup, tmp_path: Path):
    """The link follows the pins; what somebody made there by hand is not thrown away."""
    first, second = tmp_path / "first", tmp_path / "second"
    setup.tool.link(setup.tool.LINK, first)
    setup.tool.link(setup.tool.LINK, second)
    assert (tmp_path / ".venv-sglang").readlink() == second
    (tmp_path / ".venv-sglang").unlink()
    (tmp_path / ".venv-sglang").mkdir()
    with pytest.raises(setup.tool.SetupError, match="move it away"):
        setup.tool.link(setup.tool.LINK, first)


def test_the_pins_are_exact_and_agree_with_the_trainer(setup: FakeSetup):
    """Weights go from one torch to the other as pickled memory handles: on CPU they are the same release."""
    setup.tool.PINS = REPO / "requirements" / "sglang.txt"
    pinned = setup.tool.pinned()
    assert all(version[0].isdigit() and "*" not in version for version in pinned.values())
    assert (
        list(pinned)[0] == "torch" and f"torch=={pinned['torch']}" in (REPO / "requirements" / "torch.txt").read_text()
    )
    assert {"sglang", "sglang-router"} <= set(pinned)


@pytest.mark.parametrize(
    ("theirs", "ours", "installed"),
    [("2.30.7", "2.29.7", ["--no-deps nvidia-nccl-cu13==2.30.7"]), ("2.30.7", "2.30.7", []), ("2.30.7", "", [])],
)
def test_the_trainer_gets_the_servers_nccl(setup: FakeSetup, theirs: str, ours: str, installed: list[str]):
    """One communicator takes one version. Where the trainer's comes with the system it is left alone."""
    versions = {"servers": theirs, "trainer": ours}
    setup.tool.venv_tool.run = lambda python, *_: f"{versions[python]}\n"
    setup.tool.share_nccl(Path("servers"), Path("trainer"))
    assert setup.ran == installed
    assert not installed or str(setup.tool.venv_tool.PYTHON) == "trainer"
