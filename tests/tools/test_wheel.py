"""The wheel is the whole program: installed in an environment without the clone, its quick start runs to the end."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from scripts import REPO

pytestmark = pytest.mark.tools

PIP = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
# As short as it can be: a warm start of 100 steps, then two steps a method.
SHORT = [
    "--steps=2", "--data.task_args={lo: 5, hi: 8}", "--data.held_out=0.25", "--rollout.prompts_per_step=2",
    "--rollout.group_size=4", "--optimizer.warmup_steps=1",
]  # fmt: skip


def run(command: list[str], cwd: Path, environment: dict[str, str]) -> str:
    """Standard output; what went wrong, where it did."""
    done = subprocess.run(
        command, cwd=cwd, env=environment, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def tracked() -> list[str]:
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    return [name for name in listed.split("\0") if name and (REPO / name).is_file()]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Made of the files that git knows, elsewhere: a build leaves files in its folder."""
    clone, out = tmp_path_factory.mktemp("clone"), tmp_path_factory.mktemp("wheel")
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(REPO / name, clone / name)
    options = ["--quiet", "--no-deps", "--no-build-isolation", "--no-index", "-w", str(out)]
    run([*PIP, "wheel", *options, str(clone)], clone, dict(os.environ))
    (found,) = out.iterdir()
    return found


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A new environment with the wheel; the packages that it depends on are this one's, so that nothing is fetched."""
    folder = tmp_path_factory.mktemp("installed")
    run([sys.executable, "-m", "venv", "--without-pip", str(folder)], folder, dict(os.environ))
    python = str(folder / "bin" / "python")
    run(
        [*PIP, "--python", python, "install", "--quiet", "--no-deps", "--no-index", str(wheel)],
        folder,
        dict(os.environ),
    )
    (packages,) = folder.glob("lib/python*/site-packages")
    # A folder that a .pth file names is searched last, and its own .pth files, an editable install's, are not read.
    places = [place for place in sys.path if place.endswith(("site-packages", "dist-packages"))]
    (packages / "dependencies.pth").write_text("".join(f"{place}\n" for place in places))
    return folder


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment without PYTHONPATH, and with an empty home folder."""
    home = tmp_path_factory.mktemp("home")
    return {"PATH": os.defpath, "HOME": str(home), "LANG": "C.UTF-8", "OMP_NUM_THREADS": "1"}


def test_the_wheel_holds_every_file_of_the_package(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        held = set(archive.namelist())
    of_package = {name for name in tracked() if name.startswith("flowrl_mega/")}
    of_csrc = {f"flowrl_mega/{name}" for name in tracked() if name.startswith("csrc/")}
    assert "flowrl_mega/quickstart/quickstart.yaml" in of_package and of_csrc
    assert of_package | of_csrc <= held
    assert not [name for name in held if not name.startswith("flowrl_mega")], "nothing else of the clone"


def test_the_quick_start_runs_without_the_clone(installed: Path, clean: dict[str, str], tmp_path: Path) -> None:
    command = str(installed / "bin" / "flowrl-mega")
    place = run(
        [str(installed / "bin" / "python"), "-c", "import flowrl_mega; print(flowrl_mega.__file__)"], tmp_path, clean
    )
    assert Path(place).is_relative_to(installed) and "site-packages" in place
    assert "quickstart" in run([command, "--help"], tmp_path, clean)
    assert "--seeds" in run([command, "quickstart", "--help"], tmp_path, clean)
    assert not list(tmp_path.iterdir())

    said = run([command, "quickstart", *SHORT], tmp_path, clean)
    lines = [line.split()[0] for line in said.splitlines() if line.startswith(("method ", "start ", "grpo", "flowrl "))]
    assert lines[-5:] == ["method", "start", "grpo", "grpo_kl", "flowrl"], said
    folder = tmp_path / "runs" / "quickstart"
    assert [path.name for path in tmp_path.iterdir()] == ["runs"]
    for name in ("report.html", "quickstart.png"):
        assert (folder / name).stat().st_size > 10_000
    methods = json.loads((folder / "summary.json").read_text())["methods"]
    assert list(methods) == ["start", "grpo", "grpo_kl", "flowrl"] and methods["start"]["pass_rate"] > 0.35
