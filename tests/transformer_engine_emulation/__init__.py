"""Transformer Engine's own Python on a CPU: its native module is emulated in plain torch (native.py).

Its wheel lies in a folder of its own (make setup-te-emulation), which only processes that call `start` see. What is
emulated: values, FP8's rounding and which buffers are read and written. What is not: time, memory, cuDNN's and
cuBLAS's own rounding, CUDA graphs, overlapped communication.
"""

from __future__ import annotations

import importlib
import os
import sys
import warnings
from pathlib import Path
from typing import Any

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / ".te-emulation"  # a link, as .venv-sglang is
PINS = REPO / "requirements" / "te_emulation.txt"


def lacks() -> str:
    """Why there is nothing to emulate, if so."""
    (version,) = [
        line.split("==")[1] for line in PINS.read_text().splitlines() if line.startswith("transformer-engine")
    ]
    present = (FOLDER / f"transformer_engine-{version}.dist-info").is_dir()
    return "" if present else "Transformer Engine's wheel is not there (make setup-te-emulation)"


def start() -> None:
    """Make this process one with an H100 and Transformer Engine; before it imports flowrl_mega. Cannot be undone."""
    from transformer_engine_emulation import absent, hopper, native

    assert "flowrl_mega.parallel" not in sys.modules and "transformer_engine" not in sys.modules
    sys.path.append(str(FOLDER))
    hopper.install()
    sys.modules["transformer_engine_torch"] = native.module()
    os.environ["NVTE_PROJECT_BUILDING"] = "1"  # it looks for no CUDA libraries
    os.environ["NVTE_TORCH_COMPILE"] = "0"  # of small functions, which eager torch computes as well
    importlib.import_module("torch._dynamo")  # which it imports, and which looks for Triton
    with absent.importable(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # without a native module it warns, and leaves its torch part out
        common: Any = importlib.import_module("transformer_engine.common")
        common.load_framework_extension = lambda framework: None
        importlib.import_module("transformer_engine.pytorch")
    extensions: Any = sys.modules["transformer_engine.pytorch.cpp_extensions"]
    extensions.__getattr__ = native.not_emulated  # its `import *` took over only what is
    del os.environ["NVTE_PROJECT_BUILDING"]
