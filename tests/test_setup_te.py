"""Transformer Engine goes into a .venv that can use it, is compiled once for a torch, and its list is complete."""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

pytestmark = pytest.mark.tools

REPO = Path(__file__).resolve().parent.parent
MODULES = ("setup", "user_cache", "te_slim", "gpu_wheels", "setup_te")
PINS = {"other": "1.0", "transformer-engine": "2.0", "transformer-engine-torch": "2.0"}


@pytest.fixture
def there() -> SimpleNamespace:
    """What is in .venv."""
    return SimpleNamespace(torch="2.13.0+cu130", cuda="13.0", python="3.12", versions={}, wheels="1")


@pytest.fixture
def tool(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, there: SimpleNamespace) -> Iterator[Any]:
    """The tool on a .venv of its own; `tool.ran` has what it would have run, with some of its environment."""
    monkeypatch.syspath_prepend(str(REPO / "tools"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in MODULES:
        monkeypatch.delitem(sys.modules, name, raising=False)
    tool: Any = importlib.import_module("setup_te")
    headers = tmp_path / "site" / "nvidia" / "cu13" / "include"
    headers.mkdir(parents=True)
    (headers / "cuda_runtime_api.h").touch()
    (tmp_path / "python").touch()
    tool.venv_tool.PYTHON, tool.venv_tool.LOG, tool.PINS = tmp_path / "python", tmp_path / "log", tmp_path / "te.txt"
    tool.PINS.write_text("# all of it\n" + "".join(f"{name}=={version}\n" for name, version in PINS.items()))
    tool.ran, tool.fail = [], ""

    def run(python: str, *words: str) -> str:
        if words[0] == "-c":
            return json.dumps([there.torch, there.cuda, there.python, [str(headers.parents[1])], there.versions])
        what = next(word for word in words if word in ("download", "wheel"))
        if what == tool.fail:
            raise tool.SetupError("no network")
        if what == "download":
            name = "transformer_engine_torch-2.0"
            with tarfile.open(Path(words[words.index("-d") + 1], f"{name}.tar.gz"), "w:gz") as made:
                made.addfile(tarfile.TarInfo(f"{name}/setup.py"), io.BytesIO())
        else:
            wanted = {
                "NVTE_PYTORCH_FORCE_BUILD": "TRUE",
                "NVTE_BUILD_USE_NVIDIA_WHEELS": there.wheels,
                "CPATH": str(headers),
            }
            assert {name: tool.os.environ.get(name) for name in wanted} == wanted
            Path(words[words.index("-w") + 1], "transformer_engine_torch-2.0-cp312.whl").touch()
        tool.ran.append(what)
        return ""

    def pip(*words: str) -> None:
        names = [Path(word).name for word in words if not word.startswith("-")]
        tool.ran.append(names)
        there.versions |= {name.split("==")[0]: name.split("==")[1] for name in names if "==" in name}
        if names[0].endswith(".whl"):
            there.versions["transformer-engine-torch"] = "2.0"

    tool.run, tool.pip = run, pip
    tool.venv_tool.compile_all = lambda: None
    tool.venv_tool.has_gpu = lambda: False
    monkeypatch.delenv("CPATH", raising=False)
    yield tool
    for name in MODULES:
        sys.modules.pop(name, None)


OTHERS, WHEEL = ["other==1.0", "transformer-engine==2.0"], ["transformer_engine_torch-2.0-cp312.whl"]


def test_it_is_compiled_once_for_a_torch(tool: Any, there: SimpleNamespace, capsys: pytest.CaptureFixture[str]) -> None:
    tool.set_up()
    assert tool.ran == [OTHERS, "download", "wheel", WHEEL]
    assert "no GPU here, so it was not tried" in capsys.readouterr().out
    tool.set_up()
    assert tool.ran[4:] == [] and "up to date" in capsys.readouterr().out
    there.versions.clear()
    tool.set_up()
    assert tool.ran[4:] == [OTHERS, WHEEL], "a new .venv, or that of another clone"
    there.versions.clear()
    there.torch = "2.14.1+cu130"
    tool.set_up()
    assert tool.ran[6:] == [OTHERS, "download", "wheel", WHEEL]


def test_without_pytorchs_own_headers_the_toolkit_has_them(tool: Any, there: SimpleNamespace, tmp_path: Path) -> None:
    (tmp_path / "site" / "nvidia" / "cu13" / "include" / "cuda_runtime_api.h").unlink()
    there.wheels = "0"
    tool.set_up()
    assert "wheel" in tool.ran


def test_what_was_fetched_is_not_fetched_again(tool: Any, there: SimpleNamespace) -> None:
    """Also where the compilation fails."""
    tool.set_up(fetch=True)
    assert tool.ran == [OTHERS, "download"] and "transformer-engine-torch" not in there.versions
    tool.fail = "wheel"
    with pytest.raises(tool.SetupError):
        tool.set_up()
    tool.fail = ""
    tool.set_up()
    assert tool.ran[2:] == ["wheel", WHEEL]
    assert tool.os.environ.get("CPATH") is None


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"torch": "2.13.0+cpu", "cuda": None}, r"torch 2\.13\.0\+cpu in \.venv is a CPU build.*make setup TORCH=cuda"),
        ({"torch": "2.10.0+cu130"}, "torch 2.11 or newer for CUDA 13 is needed"),
        ({"torch": "2.13.0+cu126", "cuda": "12.6"}, "for CUDA 12.6 in .venv: torch 2.11 or newer for CUDA 13"),
    ],
)
def test_a_torch_that_it_cannot_use_is_refused(tool: Any, there: SimpleNamespace, changes: Any, said: str) -> None:
    vars(there).update(changes)
    with pytest.raises(tool.SetupError, match=said):
        tool.set_up()
    assert tool.ran == []


def test_without_a_venv_the_way_to_one_is_named(tool: Any, tmp_path: Path) -> None:
    (tmp_path / "python").unlink()
    with pytest.raises(tool.SetupError, match=r"make setup TORCH=cuda"):
        tool.set_up()


def test_where_there_is_a_gpu_it_is_tried(tool: Any) -> None:
    tried, run = [], tool.run
    tool.venv_tool.has_gpu = lambda: True
    tool.run = lambda *words: tried.append(words) if words[-1] == tool.TRY else run(*words)
    tool.set_up()
    assert len(tried) == 1


def test_the_version_is_the_one_that_is_tested() -> None:
    def pins(name: str) -> dict[str, str]:
        lines = (REPO / "requirements" / f"{name}.txt").read_text().splitlines()
        return dict(line.split("==") for line in lines if not line.startswith("#"))

    te, emulated = pins("te"), pins("te_emulation")
    assert {te[f"transformer-engine{part}"] for part in ("", "-cu13", "-torch")} == {emulated["transformer-engine"]}
    assert not te.keys() & pins("runtime").keys()
