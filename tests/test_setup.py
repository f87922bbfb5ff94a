"""The set-up installs what changed and nothing else, and its lists are complete."""

import importlib.util
import json
import re
import subprocess
import sys
import tomllib
from importlib import metadata
from pathlib import Path
from types import ModuleType

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

pytestmark = pytest.mark.tools

REPO = Path(__file__).resolve().parent.parent


def pins(*names: str) -> dict[str, str]:
    lines = [line for name in names for line in (REPO / "requirements" / f"{name}.txt").read_text().splitlines()]
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_locks_pin_exactly_and_do_not_disagree():
    lists = [pins(name) for name in ("torch", "runtime", "dev", "example", "linters")]
    for pinned in lists:
        assert all(re.fullmatch(r"\d[\w.]*", version) for version in pinned.values())
    assert sum(map(len, lists)) == len({name for pinned in lists for name in pinned})


def test_locks_hold_all_that_their_packages_require():
    """They are installed with --no-deps: a requirement that is not listed would be missing at run time."""
    pinned = pins("torch", "runtime", "dev")
    for name, version in pinned.items():
        if name == "torch":
            continue  # its CUDA libraries come with it, unlisted
        assert metadata.version(name) == version
        for text in metadata.requires(name) or []:
            needed = Requirement(text)
            if needed.marker is None or needed.marker.evaluate({"extra": ""}):
                found = pinned.get(canonicalize_name(needed.name))
                assert found and needed.specifier.contains(found, prereleases=True), f"{name} needs {text}"


def test_locks_hold_all_that_the_project_requires():
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    pinned = pins(
        "torch", "runtime", "dev", "example", "data", "dali", "eval", "embeddings", "tensorboard", "trackio", "docs"
    )
    for text in [*project["dependencies"], *(text for texts in extras.values() for text in texts)]:
        needed = Requirement(text)
        assert needed.specifier.contains(pinned[canonicalize_name(needed.name)]), text


class FakeSetup:
    """tools/setup.py on a small tree of its own; what it would have run is kept in `ran`."""

    def __init__(self, root: Path):
        spec = importlib.util.spec_from_file_location("setup_tool", REPO / "tools" / "setup.py")
        self.tool: ModuleType = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(self.tool)
        self.root, self.ran, self.fail_on, self.version = root, [], None, "2.11.0"
        (root / "requirements").mkdir()
        for name in ("runtime", "dev", "torch", "example"):
            (root / "requirements" / f"{name}.txt").write_text(f"{name}==1.0\n")
        for name in ("pyproject.toml", "setup.py"):
            (root / name).write_text("")
        venv = root / ".venv"
        paths = {"ROOT": root, "VENV": venv, "PYTHON": venv / "bin" / "python", "STAMP": venv / "setup.json"}
        for name, value in {**paths, "LOG": venv / "setup.log", "run": self.run, "make_venv": self.make_venv}.items():
            setattr(self.tool, name, value)  # a module of this object's own: nothing to undo
        self.tool.has_gpu = lambda: False

    def make_venv(self, system_site: bool) -> None:
        python = self.root / ".venv" / "bin" / "python"
        python.parent.mkdir(parents=True, exist_ok=True)
        python.touch()
        (self.root / ".venv" / "setup.json").unlink(missing_ok=True)
        self.ran.append("venv")

    def run(self, *command: str) -> str:
        if "-c" in command and "import torch" in command[-1]:
            return f"{self.version} {'None' if self.kind == 'cpu' else '13.0'}\n"
        what = "project" if command[-1] == str(self.root) else Path(command[-1]).name
        if "compileall" in command:
            what = "compileall"
        if what == self.fail_on:
            raise self.tool.SetupError("no network")
        self.ran.append(what)
        return ""

    def __call__(self, torch: str | None = None, *extras: str, kind: str = "cpu") -> list[str]:
        """What one set-up runs, in order."""
        self.kind, self.ran = kind, []
        self.tool.set_up(torch, [f"requirements/{name}.txt" for name in extras])
        return self.ran


@pytest.fixture
def setup(tmp_path: Path) -> FakeSetup:
    return FakeSetup(tmp_path)


FRESH = ["venv", "torch==1.0+cpu", "runtime.txt", "dev.txt", "project", "compileall", "flowrl_mega.ops"]


def test_a_second_set_up_does_nothing(setup: FakeSetup):
    assert setup() == FRESH
    assert setup() == []
    assert setup(None, "example") == ["example.txt", "compileall"]
    assert setup(None, "example") == setup() == []


def test_only_what_changed_is_installed_again(setup: FakeSetup):
    setup()
    (setup.root / "requirements" / "dev.txt").write_text("dev==2.0\n")
    assert setup() == ["dev.txt", "compileall"]
    (setup.root / "pyproject.toml").write_text("# changed")
    assert setup() == ["project", "compileall", "flowrl_mega.ops"]


def test_another_torch_python_or_place_starts_anew(setup: FakeSetup):
    setup()
    assert setup("cuda", kind="cuda") == [*FRESH[:1], "torch==1.0", *FRESH[2:]]
    assert setup("system", kind="system") == [*FRESH[:1], *FRESH[2:]]
    assert setup() == [], "a choice once made stays"
    assert setup("auto") == FRESH
    for key in ("root", "python"):
        stamp = json.loads(setup.tool.STAMP.read_text())
        setup.tool.STAMP.write_text(json.dumps({**stamp, key: "another"}))
        assert setup() == FRESH
    setup.tool.PYTHON.unlink()
    assert setup() == FRESH, "its interpreter is gone"


def test_a_failed_set_up_is_not_taken_for_complete(setup: FakeSetup):
    setup.fail_on = "dev.txt"
    with pytest.raises(setup.tool.SetupError, match="no network"):
        setup()
    setup.fail_on = None
    assert setup() == FRESH
    (setup.root / "requirements" / "dev.txt").write_text("dev==2.0\n")
    setup.fail_on = "dev.txt"
    with pytest.raises(setup.tool.SetupError):
        setup()
    setup.fail_on = None
    (setup.root / "requirements" / "dev.txt").write_text("dev==1.0\n")
    assert setup() == ["dev.txt", "compileall"], "it may be half installed"


def test_without_a_cpu_wheel_uv_is_asked_then_the_user(setup: FakeSetup):
    setup.fail_on = "torch==1.0+cpu"
    assert setup() == ["venv", setup.tool.UV, "torch==1.0", *FRESH[2:]]
    setup.tool.STAMP.unlink()
    setup.tool.UV = setup.fail_on
    with pytest.raises(setup.tool.SetupError, match=r"(?s)no CPU build of torch==1.0 .*TORCH=cuda"):
        setup()


def test_a_torch_of_the_wrong_kind_is_refused(setup: FakeSetup):
    with pytest.raises(setup.tool.SetupError, match=r"a build for CUDA 13.0, but the set-up is for TORCH=cpu"):
        setup("cpu", kind="cuda")
    setup.version = "2.9.1+cu126"
    with pytest.raises(setup.tool.SetupError, match=r"system's torch 2.9.1\+cu126 is too old"):
        setup("system", kind="system")


def test_csrc_that_does_not_build_is_a_warning(setup: FakeSetup, capsys: pytest.CaptureFixture[str]):
    setup.fail_on = "flowrl_mega.ops"
    assert setup() == FRESH[:-1]
    assert "warning: csrc was not built, so pure torch takes its place" in capsys.readouterr().out
    assert setup() == [], "all else is in place"


def test_make_refuses_another_python_with_one_message():
    command = ["make", "--no-print-directory", "setup", "PYTHON=false"]
    result = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert "setup: no Python 3.11 or 3.12 found (tried: false)" in result.stderr and "Traceback" not in result.stderr


def test_what_is_installed_is_compiled(setup: FakeSetup, monkeypatch: pytest.MonkeyPatch):
    """Where Python is told not to keep what it compiles, too; a file that is no Python is passed over."""
    real = importlib.util.module_from_spec(setup.tool.__spec__)
    setup.tool.__spec__.loader.exec_module(real)
    package = setup.root / "venv" / "lib" / "package"
    package.mkdir(parents=True)
    (package / "a.py").write_text("x = 1\n")
    (package / "b.py").write_text("def f[T](a: This is\n")
    monkeypatch.setattr(real, "VENV", setup.root / "venv")
    monkeypatch.setattr(real, "PYTHON", Path(sys.executable))
    monkeypatch.setattr(real, "LOG", setup.root / "log")
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    real.compile_all()
    assert [path.name.split(".")[0] for path in package.glob("__pycache__/*.pyc")] == ["a"]
