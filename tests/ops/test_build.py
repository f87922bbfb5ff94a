"""csrc is compiled once, with a real compiler, whoever dies on the way; and what stops it is said in one message."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest

from flowrl_mega.ops import __main__ as build_command
from flowrl_mega.ops import build

REPO = Path(__file__).resolve().parents[2]
PLAIN = (
    '#include "kernels.h"\nextern "C" __attribute__((visibility("default"))) int answer() { return twice(ANSWER); }\n'
)
SOURCES = {
    "kernels.h": "#define ANSWER 21\nint twice(int);\n",
    "plain.cpp": PLAIN,
    "avx2.cpp": '#include "kernels.h"\nint twice(int x) { return 2 * x; }\n',
}
# Finds the library of a small csrc, as a rank would; a torch that is imported in no time is in front of the real one.
RANK = f"""
import importlib.util, pathlib
spec = importlib.util.spec_from_file_location("build", {build.__file__!r})
build = importlib.util.module_from_spec(spec)
spec.loader.exec_module(build)
print(build.cached("cpu", pathlib.Path("csrc"), build.default_cache()))
"""


class Place:
    """A folder with a small csrc of its own, a cache, and a g++ that notes each file it compiles."""

    def __init__(self, root: Path, monkeypatch: pytest.MonkeyPatch):
        self.root, self.csrc, self.cache = root, root / "csrc", root / "cache" / "flowrl-mega"
        (self.csrc / "cpu").mkdir(parents=True)
        for name, text in SOURCES.items():
            self.write(name, text)
        torch = Path(find_spec("torch").submodule_search_locations[0])
        (root / "torch").mkdir()
        (root / "torch" / "__init__.py").write_text("__version__ = '2.13.0'\nclass version: cuda = None\n")
        for folder in ("include", "lib"):
            (root / "torch" / folder).symlink_to(torch / folder)
        monkeypatch.setenv("XDG_CACHE_HOME", str(root / "cache"))
        monkeypatch.setenv("CXX", self.compiler('[ "$1" = --version ] || echo "$@" >> ${0%/*}/compiled; exec g++ "$@"'))
        monkeypatch.setattr(build, "_failed", {})
        monkeypatch.setattr(build, "sources", lambda: self.csrc)

    def write(self, name: str, text: str) -> None:
        (self.csrc / "cpu" / name).write_text(text)

    def compiler(self, script: str, name: str = "compiler") -> str:
        path = self.root / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)
        return str(path)

    def compiled(self) -> int:
        """How many files so far."""
        log = self.root / "compiled"
        return log.read_text().count(" -c ") if log.exists() else 0

    def rank(self, **env: str) -> subprocess.Popen[str]:
        env = {**os.environ, "PYTHONPATH": str(self.root), **env}
        python = [sys.executable, "-c", RANK]
        return subprocess.Popen(
            python, cwd=self.root, env=env, stdout=subprocess.PIPE, text=True, start_new_session=True
        )


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    return Place(tmp_path, monkeypatch)


@pytest.mark.integration
def test_ten_ranks_build_once(place: Place):
    ranks = [place.rank() for _ in range(10)]
    found = {rank.communicate(timeout=200)[0].strip() for rank in ranks}
    assert [rank.returncode for rank in ranks] == [0] * 10
    assert len(found) == 1 and place.compiled() == 2
    assert {path.suffix for path in place.cache.iterdir()} == {".so", ".json", ".lock", ".log"}, "nothing half made"
    load = f"import ctypes, torch; print(ctypes.CDLL({found.pop()!r}).answer())"
    assert subprocess.run([sys.executable, "-c", load], capture_output=True, text=True).stdout == "42\n"


@pytest.fixture
def stuck(place: Place) -> Iterator[subprocess.Popen[str]]:
    """A rank whose compiler has begun and will not end."""
    script = 'case $1 in --version) exec g++ "$@";; *) touch ${0%/*}/begun; exec sleep 600;; esac'
    rank = place.rank(CXX=place.compiler(script, "sleeper"))
    deadline = time.monotonic() + 60
    while not (place.root / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    yield rank
    os.killpg(rank.pid, signal.SIGKILL)
    rank.wait()
    rank.stdout.close()


@pytest.mark.slow
def test_a_killed_builder_does_not_block_the_next(place: Place, stuck: subprocess.Popen[str]):
    waiting = place.rank()
    with pytest.raises(subprocess.TimeoutExpired):
        waiting.wait(1)
    assert place.compiled() == 0, "the first one has the lock"
    stuck.kill()  # its compilers live on, which must not matter
    assert waiting.communicate(timeout=200)[0].strip().endswith(".so")
    assert waiting.returncode == 0 and place.compiled() == 2


def test_the_key_is_of_all_that_a_build_depends_on(place: Place, monkeypatch: pytest.MonkeyPatch):
    torch = build.find_torch()
    first = build.library("cpu")
    seen = [first]

    def is_new() -> bool:
        seen.append(build.library("cpu"))
        return seen[-1] not in seen[:-1] and seen[-1].exists()

    place.write("notes.txt", "no source")
    assert not is_new()
    place.write("plain.cpp", PLAIN.replace("twice(ANSWER)", "ANSWER"))
    assert is_new()
    place.write("kernels.h", SOURCES["kernels.h"].replace("21", "20"))
    assert is_new()
    place.write("more.cpp", "")
    assert is_new()
    with monkeypatch.context() as patch:
        patch.setattr(build, "find_torch", lambda: torch._replace(version="2.14.0"))
        assert is_new()
    with monkeypatch.context() as patch:
        patch.setattr(build, "FLAGS", [*build.FLAGS, "-g"])
        assert is_new()
    with monkeypatch.context() as patch:
        other = place.compiler('[ "$1" = --version ] && echo another && exit; exec g++ "$@"', "other")
        patch.setenv("CXX", other)
        assert is_new()

    (place.csrc / "cpu" / "more.cpp").unlink()
    for name, text in SOURCES.items():
        place.write(name, text)
    before = place.compiled()
    assert build.library("cpu") == first and place.compiled() == before, "what was built is kept"


def test_no_compiler(place: Place, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CXX", "no-such-compiler -m64")
    with pytest.raises(build.BuildError, match=r"tried CXX=no-such-compiler -m64\): install one .* or set ops.backend"):
        build.library("cpu")
    monkeypatch.delenv("CXX")
    monkeypatch.setenv("PATH", str(place.root))
    with pytest.raises(build.BuildError, match=r"tried CXX="):
        build.library("cpu")  # as this process remembers it
    monkeypatch.setattr(build, "_failed", {})
    with pytest.raises(build.BuildError, match=r"tried g\+\+, c\+\+, clang\+\+\).*apt install g\+\+"):
        build.library("cpu")


def test_a_node_without_compiler_uses_what_another_built(place: Place, monkeypatch: pytest.MonkeyPatch):
    built = build.library("cpu")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert build.library("cpu") == built
    record = built.with_suffix(".json")
    good = json.loads(record.read_text())
    for name, value in {"libc": "999.0", "machine": "abacus", "sources": "", "flags": ""}.items():
        record.write_text(json.dumps({**good, name: value}))
        with pytest.raises(build.BuildError, match="no C\\+\\+ compiler found"):
            build.cached("cpu", place.csrc, place.cache)


def test_a_source_with_an_error(place: Place):
    place.write("plain.cpp", "int f() { return 1; }\nint g() { return nothing; }\n")
    with pytest.raises(build.BuildError) as caught:
        build.library("cpu")
    message = str(caught.value)
    assert message.startswith("csrc/cpu does not compile:\n") and len(message.splitlines()) < 8
    assert "plain.cpp:2:18: error: 'nothing' was not declared" in message
    log = Path(message.splitlines()[-1].removeprefix("All output: "))
    assert "was not declared" in log.read_text() and log.parent == place.cache
    assert not list(place.cache.glob("*.so")) and not list(place.cache.glob("*.part"))

    before = place.compiled()
    with pytest.raises(build.BuildError, match="does not compile"):
        build.library("cpu")
    assert place.compiled() == before, "not tried twice in one process"
    place.write("plain.cpp", PLAIN)
    assert build.cached("cpu", place.csrc, place.cache).exists()


def test_a_function_without_a_body_is_found_by_the_build_not_by_the_load(place: Place):
    (place.csrc / "cpu" / "avx2.cpp").unlink()
    with pytest.raises(build.BuildError, match=r"(?s)csrc/cpu does not link:.*undefined reference to .twice"):
        build.library("cpu")


def test_folders_that_cannot_be_used(place: Place, monkeypatch: pytest.MonkeyPatch):
    (place.root / "cache").write_text("a file")
    with pytest.raises(build.BuildError, match="cannot be built into .*XDG_CACHE_HOME names another"):
        build.library("cpu")
    monkeypatch.setattr(build, "_failed", {})
    shutil.rmtree(place.csrc)
    with pytest.raises(build.BuildError, match="there are no sources in .*csrc/cpu"):
        build.library("cpu")


def test_only_x86_files_get_x86_flags(place: Place, monkeypatch: pytest.MonkeyPatch):
    tools = build.find_tools("cpu")
    commands = build.compile_commands("cpu", place.csrc, tools, place.root)
    assert [path.name for path in commands] == ["plain.cpp.o", "avx2.cpp.o"], "in the order of linking"
    simd = [[flag for flag in command if flag.startswith("-m")] for command in commands.values()]
    assert simd == [[], ["-mavx2", "-mfma", "-mf16c"]]
    monkeypatch.setattr(build.platform, "machine", lambda: "aarch64")
    commands = build.compile_commands("cpu", place.csrc, tools, place.root)
    assert not [flag for command in commands.values() for flag in command if flag.startswith("-m")]
    assert not {"-ffast-math", "-march=native"} & {flag for command in commands.values() for flag in command}


def test_nvcc_is_that_of_torchs_cuda(place: Place, monkeypatch: pytest.MonkeyPatch):
    torch = build.find_torch()._replace(version="2.13.0+cu130", cuda="13.0")
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    monkeypatch.setattr(build, "USUAL_CUDA", "/none")
    monkeypatch.setenv("PATH", f"{place.root}/12/bin:{os.environ['PATH']}")
    for release in ("12", "13"):
        (place.root / release / "bin").mkdir(parents=True)
        place.compiler(f"echo Cuda compilation tools, release {release}.8, V{release}.8.93", f"{release}/bin/nvcc")
    monkeypatch.setenv("CUDA_HOME", str(place.root / "12"))
    monkeypatch.delenv("CUDA_PATH", raising=False)
    with pytest.raises(build.ToolMissing, match=r"no nvcc of torch's CUDA 13.0 found \(.*/12/bin/nvcc is 12.8 in"):
        build.find_tools("cuda")
    monkeypatch.setenv("CUDA_PATH", str(place.root / "13"))
    tools = build.find_tools("cuda")
    assert tools.nvcc == f"{place.root}/13/bin/nvcc" and tools.cuda == "13.8" and "V13.8.93" in tools.versions


def test_nvcc_from_pip_is_found_after_all_others(place: Place, monkeypatch: pytest.MonkeyPatch):
    """pip's cuda-toolkit puts it beside the CUDA packages that torch brings, where no PATH leads."""
    torch = build.find_torch()._replace(version="2.13.0+cu130", cuda="13.0")
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    monkeypatch.setattr(build, "USUAL_CUDA", "/none")
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PATH", str(place.root))  # a toolkit may be installed here
    site = place.root / "site"
    (site / "nvidia").mkdir(parents=True)
    spec = SimpleNamespace(submodule_search_locations=[str(site / "nvidia")])
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: spec if name == "nvidia" else None)
    monkeypatch.setattr(build, "find_cxx", lambda: (["g++"], ""))
    with pytest.raises(
        build.ToolMissing, match=r"none in .* pip's nvidia/cu\*\).*pip install 'cuda-toolkit\[nvcc,.*==13.0"
    ):
        build.find_tools("cuda")

    def install(name: str, release: str) -> str:
        (place.root / name / "bin").mkdir(parents=True)
        return place.compiler(f"echo Cuda compilation tools, release {release}, V{release}.88", f"{name}/bin/nvcc")

    install("site/nvidia/cu9", "9.0")
    thirteen = install("site/nvidia/cu13", "13.0")
    fourteen = install("site/nvidia/cu14", "14.1")
    tools = build.find_tools("cuda")
    assert tools.nvcc == thirteen, "of torch's CUDA"
    assert f"-L{site}/nvidia/cu13/lib" in build._link_command([], tools, place.root / "cuda.so")
    assert list(build.find_nvccs())[:2] == [fourteen, thirteen]
    usual = install("usual", "13.2")
    monkeypatch.setattr(build, "USUAL_CUDA", str(place.root / "usual"))
    assert build.find_tools("cuda").nvcc == usual
    monkeypatch.setattr(build.importlib.util, "find_spec", lambda name: None)
    assert list(build.find_nvccs()) == [usual]


def test_a_cuda_library_serves_the_same_major_release(place: Place, monkeypatch: pytest.MonkeyPatch):
    (place.csrc / "cuda").mkdir()
    (place.csrc / "cuda" / "kernels.cu").write_text("")
    path = place.root / "cuda.so"
    path.touch()
    record = {**build._origin("cuda", place.csrc), "libc": "2.0", "cuda": "13.8"}
    path.with_suffix(".json").write_text(json.dumps(record))
    torch = build.find_torch()
    for cuda, fits in {"13.0": True, "12.8": False, None: False}.items():
        monkeypatch.setattr(build, "find_torch", lambda cuda=cuda: torch._replace(cuda=cuda))
        assert build._fits(path, "cuda", place.csrc) == fits


def test_the_command(place: Place, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    torch = build.find_torch()._replace(version="2.13.0+cpu", cuda=None)
    monkeypatch.setattr(build, "find_torch", lambda: torch)
    assert build_command.main([]) == 0
    said = capsys.readouterr()
    assert f"cpu: {build.library('cpu')} (" in said.out and not said.err
    assert "cuda: not built: torch 2.13.0+cpu is a CPU build" in said.out
    place.write("plain.cpp", "int f( {")
    assert build_command.main([]) == 1
    assert capsys.readouterr().err.startswith("error: csrc/cpu does not compile:\n")


def test_the_cuda_check_without_nvcc_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(build, "find_nvccs", dict)
    assert build_command.main(["--check-cuda", str(tmp_path)]) == 0
    assert "csrc/cuda is not checked: there is no nvcc in CUDA_HOME" in capsys.readouterr().out


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A copy of what an installation is made from, so that it leaves nothing in the repository."""
    root = tmp_path / "checkout"
    root.mkdir()
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE"):
        shutil.copy(REPO / name, root)
    for name in ("flowrl_mega", "csrc"):
        shutil.copytree(REPO / name, root / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info"))
    return root


@pytest.mark.integration
def test_an_installed_package_has_its_library_inside(checkout: Path, tmp_path: Path):
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-compile"]
    options = ["--no-build-isolation", "--no-deps", "--no-index", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, *options, str(checkout)], check=True, timeout=250)
    wheel = next((tmp_path / "site").glob("flowrl_mega-*.dist-info/WHEEL")).read_text()
    assert "Root-Is-Purelib: false" in wheel and "Tag: py3-none-linux" in wheel

    script = """
from flowrl_mega.ops import build, kernels
kernels.load("cpu")
print(build.library("cpu"), build.sources(), kernels.NATIVE.logprob_stats, sep="\\n")
"""
    env = {**os.environ, "PYTHONPATH": str(tmp_path / "site"), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    env |= {"CXX": "no-such-compiler"}
    result = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    package = tmp_path / "site" / "flowrl_mega"
    assert result.stdout.split("\n")[:2] == [str(package / "ops" / "lib" / "cpu.so"), str(package / "csrc")]
    assert not (tmp_path / "cache").exists()


@pytest.mark.slow
@pytest.mark.parametrize("hook", ["build_wheel", "build_editable"])
def test_what_is_built_without_a_compiler_is_pure_python(checkout: Path, tmp_path: Path, hook: str):
    """An editable install does not even try: what is built on first use stays up to date with csrc."""
    command = [sys.executable, "-c", f"import setuptools.build_meta as b; b.{hook}({str(tmp_path)!r})"]
    env = {**os.environ, "CXX": "no-such-compiler"}
    result = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    said = "installed without its cpu library: no C++ compiler found (tried CXX=no-such-compiler)" in result.stderr
    assert said == (hook == "build_wheel")
    [wheel] = tmp_path.glob("*-py3-none-any.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    assert not [name for name in names if name.endswith(".so")]
    assert ("flowrl_mega/csrc/cpu/binding.cpp" in names) == (hook == "build_wheel")


def test_a_source_distribution_holds_csrc(checkout: Path, tmp_path: Path):
    command = [sys.executable, "-c", f"import setuptools.build_meta as b; b.build_sdist({str(tmp_path)!r})"]
    subprocess.run(command, cwd=checkout, check=True, capture_output=True)
    listing = subprocess.run(["tar", "tf", *tmp_path.glob("*.tar.gz")], capture_output=True, text=True).stdout
    assert "/csrc/cpu/kernels.h\n" in listing and "/csrc/cpu/binding.cpp\n" in listing


def test_the_sources_keep_to_the_oldest_torch():
    """CI has newer headers, so a name that torch 2.11 lacks would be found on a GPU machine alone. Names that came
    later; and of what 2.11 has, the header that it is in."""
    later = ("STABLE_TORCH_ERROR_CODE_CHECK",)  # 2.13; TORCH_ERROR_CODE_CHECK is the same there
    where = {"STD_CUDA_CHECK": "torch/csrc/stable/macros.h", "DeviceGuard": "torch/csrc/stable/accelerator.h"}
    for file in sorted((REPO / "csrc").rglob("*.cpp")):
        text = file.read_text()
        assert not [name for name in later if re.search(rf"\b{name}\b", text)], file
        for name, header in where.items():
            assert name not in text or f"#include <{header}>" in text, f"{file} uses {name}"
