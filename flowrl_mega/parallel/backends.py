"""Which optional CUDA libraries are really there: Transformer Engine, NVIDIA's Apex, and why not where they are not.

Megatron picks them by itself as it is imported (optimizer: Transformer Engine, then Apex, then torch), but guards
against nothing but ImportError: a Transformer Engine without a GPU raises RuntimeError, an Apex without its extensions
fails only when an optimizer is made, and PyPI's `apex`, a web toolkit, passes for NVIDIA's. So `prepare` looks first.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from functools import cache
from pathlib import Path
from typing import NamedTuple

import torch
from packaging.version import Version

from flowrl_mega.config import ConfigError, Fp8Recipe

NO_GPU = "no NVIDIA GPU"
OLDEST = "2.20"  # Transformer Engine's version that this was written for


class Found(NamedTuple):
    """Whether a library can be used here, and its version, or the reason why it cannot."""

    usable: bool
    why: str


def prepare() -> None:
    """Before the first `import megatron.core`: hide from it what it would trip over. Safe to call again."""
    for name, found in (("transformer_engine", transformer_engine()), ("apex", apex())):
        if not found.usable and importlib.util.find_spec(name) is not None:
            for module in [m for m in sys.modules if m == name or m.startswith(f"{name}.")]:
                del sys.modules[module]  # what a failed import has left
            sys.modules[name] = None  # type: ignore[assignment]  # an import of it is now an ImportError


@cache
def transformer_engine() -> Found:
    """Imported, where there is a GPU: whether its libraries fit this machine's shows only then."""
    if importlib.util.find_spec("transformer_engine") is None:
        return Found(False, "Transformer Engine is not installed")
    if not torch.cuda.is_available():
        return Found(False, NO_GPU)
    try:
        importlib.import_module("transformer_engine.pytorch")
    except Exception as error:  # RuntimeError, FileNotFoundError, OSError of a library that does not load, ...
        return Found(False, f"Transformer Engine cannot be imported ({_first_line(error)})")
    version = sys.modules["transformer_engine"].__version__
    if Version(version) < Version(OLDEST):
        return Found(False, f"Transformer Engine {version} is older than {OLDEST}")
    return Found(True, f"Transformer Engine {version}")


@cache
def apex() -> Found:
    """Known by its files, without importing it. Raises ConfigError where the package of that name is another one."""
    spec = importlib.util.find_spec("apex")
    if spec is None:
        return Found(False, "Apex is not installed")
    folders = [Path(folder) for folder in spec.submodule_search_locations or ()]
    if not any((folder / "optimizers" / "fused_adam.py").is_file() for folder in folders):
        raise ConfigError(
            f"the package apex at {spec.origin or folders[0]} is not NVIDIA's Apex (PyPI's apex is a web toolkit), and "
            "Megatron would import it in its place; pip uninstall apex. NVIDIA's is built from source: "
            "https://github.com/NVIDIA/apex"
        )
    if importlib.util.find_spec("amp_C") is None:
        return Found(False, "Apex was built without its CUDA extensions (no module amp_C)")
    if not torch.cuda.is_available():
        return Found(False, NO_GPU)
    return Found(True, "NVIDIA's Apex")


def apex_norm() -> Found:
    """Apex's fused RMSNorm, an extension of its own."""
    if not apex().usable:
        return apex()
    if importlib.util.find_spec("fused_layer_norm_cuda") is None:
        return Found(False, "Apex was built without fused_layer_norm_cuda")
    return Found(True, "Apex's fused RMSNorm")


def weight_gradient_extension() -> bool:
    """Whether Megatron's own linear layers can add weight gradients to the fp32 buffer inside the GEMM."""
    return apex().usable and importlib.util.find_spec("fused_weight_gradient_mlp_cuda") is not None


def fp8_support(recipe: Fp8Recipe) -> Found:
    """Whether this GPU has what the recipe needs, in Transformer Engine's own words."""
    if not (engine := transformer_engine()).usable:
        return engine
    te = importlib.import_module("transformer_engine.pytorch")
    ask = te.is_fp8_block_scaling_available if recipe == "blockwise" else te.is_fp8_available
    usable, reason = ask(return_reason=True)
    name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return Found(usable, f"{name} (compute capability {major}.{minor})" + ("" if usable else f": {reason.rstrip('.')}"))


def optimizer() -> str:
    """The Adam that Megatron has taken, and why, in words."""
    adam = importlib.import_module("megatron.core.optimizer").Adam
    if adam.__module__.startswith("transformer_engine"):
        return f"FusedAdam of {transformer_engine().why}"
    if adam.__module__.startswith("apex"):
        return f"FusedAdam of NVIDIA's Apex ({transformer_engine().why})"
    return f"torch's AdamW ({transformer_engine().why}; {apex().why})"


def _first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).split("\n")[0]
