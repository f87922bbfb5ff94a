"""Which optional libraries are found, and what is said of those that are not; on real directory trees of fake packages.

Apex's trees have the files that NVIDIA's repository installs; Transformer Engine's have its functions and reasons.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from jobs import write_config

from flowrl_mega.config import ConfigError
from flowrl_mega.parallel import backends

Tree = Callable[..., Path]
ENGINE = '__version__ = "2.20.2"\n'
CHECKS = """
def is_fp8_available(return_reason=False): return {fp8}
def is_fp8_block_scaling_available(return_reason=False): return {blocks}
"""
ADAM = "class FusedAdam: pass\nclass FusedSGD: pass\n"
NVIDIA = {"apex/__init__.py": "", "apex/optimizers/__init__.py": ADAM, "apex/optimizers/fused_adam.py": ADAM}


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Tree:
    """Writes these files into a folder that comes first on sys.path, and forgets what was found before."""
    before = dict(sys.modules)

    def write(files: dict[str, str]) -> Path:
        for name, text in files.items():
            (tmp_path / "packages" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "packages" / name).write_text(text)
        monkeypatch.syspath_prepend(tmp_path / "packages")
        for name in [name for name in sys.modules if name.split(".")[0] in ("transformer_engine", "apex")]:
            monkeypatch.delitem(sys.modules, name)
        _forget()
        return tmp_path / "packages"

    yield write
    for name in set(sys.modules) - set(before):
        if name.split(".")[0] in ("transformer_engine", "apex"):
            del sys.modules[name]
    _forget()


def _forget() -> None:
    backends.transformer_engine.cache_clear()
    backends.apex.cache_clear()


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch says that there is an A100."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "NVIDIA A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))


def engine(fp8: str = '(True, "")', blocks: str = '(True, "")') -> dict[str, str]:
    checks = CHECKS.format(fp8=fp8, blocks=blocks)
    return {"transformer_engine/__init__.py": ENGINE, "transformer_engine/pytorch/__init__.py": checks}


def test_nothing_is_installed(tree: Tree) -> None:
    tree({})
    if backends.transformer_engine().usable or backends.apex().usable:
        pytest.skip("this machine has them")
    assert backends.transformer_engine() == (False, "Transformer Engine is not installed")
    assert backends.apex() == (False, "Apex is not installed")
    assert backends.optimizer() == "torch's AdamW (Transformer Engine is not installed; Apex is not installed)"


def test_transformer_engine_is_imported_only_where_there_is_a_gpu(tree: Tree, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    tree({"transformer_engine/__init__.py": "raise SystemExit('imported')"})
    assert backends.transformer_engine() == (False, "no NVIDIA GPU")


def test_transformer_engine_with_a_gpu(tree: Tree, gpu: None) -> None:
    tree(engine())
    assert backends.transformer_engine() == (True, "Transformer Engine 2.20.2")


def test_a_transformer_engine_of_another_age(tree: Tree, gpu: None) -> None:
    tree({**engine(), "transformer_engine/__init__.py": '__version__ = "2.9.0+abc"'})
    assert backends.transformer_engine() == (False, "Transformer Engine 2.9.0+abc is older than 2.20")


@pytest.mark.parametrize("fault", ["RuntimeError('no libcudnn\\nmore')", "FileNotFoundError('no libcudnn')"])
def test_a_broken_transformer_engine_is_told_and_hidden(fault: str, tree: Tree, gpu: None) -> None:
    """Its submodules too, of which a failed import leaves some; every import of it then is an ImportError."""
    tree(
        {
            "transformer_engine/__init__.py": f"import transformer_engine.common\n{ENGINE}",
            "transformer_engine/common/__init__.py": "",
            "transformer_engine/pytorch/__init__.py": f"import transformer_engine.pytorch.optimizers\nraise {fault}",
            "transformer_engine/pytorch/optimizers/__init__.py": ADAM,
        }
    )
    assert backends.transformer_engine() == (False, "Transformer Engine cannot be imported (no libcudnn)")
    assert "transformer_engine.pytorch.optimizers" in sys.modules
    backends.prepare()
    backends.prepare()
    for name in ("transformer_engine", "transformer_engine.common", "transformer_engine.pytorch.optimizers"):
        with pytest.raises(ImportError):
            __import__(name)


def test_fp8_support_is_transformer_engines_own_answer(tree: Tree, gpu: None) -> None:
    """An A100 has none; a GPU with per-tensor scales alone is told which recipe needs what."""
    no = "Device compute capability 8.9 or higher required for FP8 execution."
    blocks = "FP8 block scaled GEMM requires compute capability 9.0 or higher and CUDA >= 12.9."
    tree(engine(fp8=repr((False, no)), blocks=repr((False, blocks))))
    reasons = {"delayed": no, "tensorwise": no, "blockwise": blocks}
    for recipe, reason in reasons.items():
        wanted = f"NVIDIA A100 (compute capability 8.0): {reason[:-1]}"
        assert backends.fp8_support(recipe) == (False, wanted)  # type: ignore[arg-type]
    tree(engine(blocks=repr((False, blocks))))
    for name in [name for name in sys.modules if name.startswith("transformer_engine")]:
        del sys.modules[name]
    assert [backends.fp8_support(recipe).usable for recipe in reasons] == [True, True, False]  # type: ignore[arg-type]


@pytest.mark.parametrize("files", [{"apex/__init__.py": "", "apex/antispam/__init__.py": ""}, {"apex.py": ""}])
def test_pypis_apex_is_refused_without_importing_it(files: dict[str, str], tree: Tree) -> None:
    first = next(iter(files))
    folder = tree({**files, first: "raise SystemExit('imported')"})
    with pytest.raises(ConfigError) as refused:
        backends.apex()
    for part in (str(folder / first), "not NVIDIA's", "pip uninstall apex", "github.com/NVIDIA/apex"):
        assert part in str(refused.value)


def test_apex_is_used_as_far_as_its_extensions_go(tree: Tree, gpu: None, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = "raise SystemExit('imported')"
    tree({**NVIDIA, "apex/__init__.py": broken})
    assert backends.apex() == (False, "Apex was built without its CUDA extensions (no module amp_C)")
    assert backends.apex_norm() == backends.apex()
    tree({"amp_C.py": broken})
    assert backends.apex() == (True, "NVIDIA's Apex")
    assert backends.apex_norm() == (False, "Apex was built without fused_layer_norm_cuda")
    assert not backends.weight_gradient_extension()
    tree({"fused_layer_norm_cuda.py": broken, "fused_weight_gradient_mlp_cuda.py": broken})
    assert backends.apex_norm().usable and backends.weight_gradient_extension()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    _forget()
    assert backends.apex() == (False, "no NVIDIA GPU")
    assert not backends.apex_norm().usable and not backends.weight_gradient_extension()


def python(code: str, packages: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A process of its own, without a GPU: what is imported, and in which order, is the point."""
    path = os.pathsep.join([str(packages), *filter(None, sys.path)])
    environment = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, env=environment, timeout=120, capture_output=True, text=True)


@pytest.mark.slow
def test_megatron_never_sees_what_cannot_be_used(tree: Tree) -> None:
    """Here Transformer Engine raises RuntimeError, as it does without a GPU, which Megatron lets through; and Apex
    without extensions has a FusedAdam that Megatron would take and that raises when it is made."""
    folder = tree({"transformer_engine/__init__.py": "raise RuntimeError('no GPU')", **NVIDIA})
    code = (
        "from flowrl_mega.parallel import backends; from megatron.core.optimizer import Adam\n"
        "from megatron.core.fp8_utils import HAVE_TE; print(Adam.__module__.split('.')[0], HAVE_TE)\n"
        "print(backends.optimizer())"
    )
    ran = python(code, folder)
    assert ran.returncode == 0, ran.stderr
    why = "no NVIDIA GPU; Apex was built without its CUDA extensions (no module amp_C)"
    assert ran.stdout.splitlines()[-2:] == ["torch False", f"torch's AdamW ({why})"]


@pytest.mark.slow
def test_the_command_line_refuses_pypis_apex(tree: Tree, tiny_llama: Path, tmp_path: Path) -> None:
    """One message and exit code 2, before Megatron can import it."""
    folder = tree({"apex/__init__.py": "raise SystemExit('imported')"})
    code = "import sys; from flowrl_mega import cli; sys.exit(cli.main())"
    ran = python(code, folder, "train", str(write_config(tmp_path, tiny_llama)), "--dry-run")
    assert ran.returncode == 2 and ran.stdout == ""
    assert ran.stderr.startswith(f"flowrl-mega: the package apex at {folder / 'apex' / '__init__.py'} is not NVIDIA's")
    assert ran.stderr.count("\n") == 1
