"""examples/container and the shell scripts: read by their linters, two definitions of one image compared, and the steps
of install.sh told by apt-get and make. No image is built: that needs a registry of images."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from scripts import REPO

pytestmark = pytest.mark.tools

CONTAINER = REPO / "examples" / "container"
DOCKERFILE, DEFINITION, INSTALL = (CONTAINER / name for name in ("Dockerfile", "flowrl-mega.def", "install.sh"))
SHELL = sorted(
    file.relative_to(REPO)
    for pattern in ("tools/*.sh", "examples/*/*.sh", "examples/*/*.sbatch", ".ci/run")
    for file in REPO.glob(pattern)
)


def linter(name: str) -> str:
    """Its program; without `make setup-tests` the test is skipped."""
    found = shutil.which(name, path=str(Path(sys.executable).parent)) or shutil.which(name)
    if not found:
        pytest.skip(f"no {name}; make setup-tests installs it")
    return found


def lint(*command: str | Path) -> str:
    done = subprocess.run([str(word) for word in command], cwd=REPO, capture_output=True, text=True, timeout=60)
    assert (done.returncode == 0) == (not done.stdout), done.stderr
    return done.stdout


@pytest.mark.parametrize("script", SHELL, ids=str)
def test_shell_scripts(script: Path) -> None:
    subprocess.run(["bash", "-n", script], cwd=REPO, check=True, timeout=60)
    assert lint(linter("shellcheck"), "--format=gcc", script) == ""


def test_the_shell_scripts_are_found() -> None:
    assert {"install.sh", "train.sbatch", "setup_debian.sh", "run"} <= {script.name for script in SHELL}


def test_the_dockerfile(tmp_path: Path) -> None:
    hadolint = linter("hadolint")
    assert lint(hadolint, "--no-color", DOCKERFILE) == ""
    (tmp_path / "Dockerfile").write_text(re.sub(r"(FROM [^:]+):.*", r"\1", DOCKERFILE.read_text()))
    assert "DL3006" in lint(hadolint, "--no-color", tmp_path / "Dockerfile"), "a base without a tag"
    (tmp_path / "Dockerfile").write_text(DOCKERFILE.read_text().replace("RUN ", "EXECUTE "))
    assert "unexpected 'E'" in lint(hadolint, "--no-color", tmp_path / "Dockerfile"), "no instruction"


def base(text: str) -> str:
    (found,) = re.findall(r"^F(?:ROM|rom:) (\S+)$", text, re.M)
    return found


def test_one_base_pinned_to_the_cuda_release_of_the_packages() -> None:
    image = base(DOCKERFILE.read_text())
    assert image == base(DEFINITION.read_text())
    found = re.fullmatch(r"nvidia/cuda:(\d+\.\d+)\.\d+-devel-ubuntu24\.04", image)
    assert found, "with nvcc, and with Python 3.12"
    pins = (REPO / "requirements" / "te.txt").read_text()
    assert f"\nnvidia-cuda-crt=={found[1]}." in pins and f"\nnvidia-cuda-cccl=={found[1]}." in pins


def test_both_images_hold_the_same_files() -> None:
    """All that the set-up reads, and nothing that was built in the clone."""
    docker, copied = DOCKERFILE.read_text(), {}
    for words in (line.split()[1:] for line in docker.splitlines() if line.startswith("COPY ")):
        copied |= {word: f"/opt/flowrl-mega/{word if words[-1] == './' else words[-1]}" for word in words[:-1]}
    section = DEFINITION.read_text().split("%files\n")[1].split("\n\n")[0]
    assert dict(line.split() for line in section.splitlines()) == copied
    assert all((REPO / name).exists() for name in copied)
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, check=True, capture_output=True, text=True).stdout
    tops = {name.split("/")[0] for name in listed.splitlines()}
    for_people = {".pre-commit-config.yaml", "CHANGELOG.md", "CONTRIBUTING.md", "docs", "mkdocs.yml"}
    assert tops - copied.keys() == {".ci", ".gitignore", "tests"} | for_people


def test_both_images_have_the_same_step_and_path() -> None:
    docker, apptainer = DOCKERFILE.read_text(), DEFINITION.read_text()
    assert re.findall(r"^RUN (.*)$", docker, re.M) == ["examples/container/install.sh"]
    assert "%post\n    cd /opt/flowrl-mega\n    examples/container/install.sh\n\n" in apptainer
    assert "WORKDIR /opt/flowrl-mega\n" in docker
    path = "PATH=/opt/flowrl-mega/.venv/bin:$PATH\n"
    assert f"\nENV {path}" in docker and f"%environment\n    export {path}" in apptainer


def dry_run(script: Path) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("MAKE")}  # of a make above
    return subprocess.run([script, "--dry-run"], env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.integration
def test_the_steps_of_the_image_on_debian(tmp_path: Path) -> None:
    """Packages with all that they need, as where nothing is installed; make's steps as make tells them."""
    if not shutil.which("apt-get"):
        pytest.skip("no apt-get: not Debian or Ubuntu")
    if not list(Path("/var/lib/apt/lists").glob("*Packages*")):
        subprocess.run(["apt-get", "update", "-qq"], timeout=120)  # as root; else apt-get says what is missing
    done = dry_run(INSTALL)
    assert done.returncode == 0, done.stderr
    installed = {line.split()[1] for line in done.stdout.splitlines() if line.startswith("Inst ")}
    assert {"g++", "git", "make", "ca-certificates", "libnuma1", "libibverbs1"} <= installed
    (python,) = (name for name in installed if re.fullmatch(r"python3\.\d+", name))
    assert {python, f"{python}-dev", f"{python}-venv"} <= installed and python in ("python3.11", "python3.12")
    steps = re.findall(r"tools/setup(?:_\w+)?\.py(?: --torch \"cuda\")?", done.stdout)
    first, te, sglang = (f"tools/setup{name}.py" for name in ("", "_te", "_sglang"))
    assert steps == [f'{first} --torch "cuda"', first, te, f'{first} --torch "cuda"', f'{sglang} --torch "cuda"']

    clone = tmp_path / "examples" / "container"
    clone.mkdir(parents=True)
    shutil.copy(REPO / "Makefile", tmp_path)
    (clone / "install.sh").write_text(INSTALL.read_text().replace("libnuma1 ", "libnuma-none "))
    (clone / "install.sh").chmod(0o755)
    failed = dry_run(clone / "install.sh")
    assert failed.returncode != 0 and "libnuma-none" in failed.stderr, "a package that Debian does not have"
