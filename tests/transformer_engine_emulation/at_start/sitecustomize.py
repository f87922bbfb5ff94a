"""With this folder on PYTHONPATH every Python process takes itself for one with an H100 and Transformer Engine, and has
csrc/cuda, emulated, in the place of csrc/cpu; for tools/gpu_rehearsal.py."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

TESTS = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(TESTS), str(TESTS / "ops")]

import torch  # noqa: E402
from cuda_emulation import Emulation  # noqa: E402
from transformer_engine_emulation import started  # noqa: E402, F401

from flowrl_mega.ops import build, kernels  # noqa: E402

kernels.NATIVE = Emulation(build.default_cache() / "cuda_emulation").kernels

# What a measurement asks of a GPU, and nothing else does.
cuda: Any = torch.cuda
for name in ("set_sync_debug_mode", "reset_peak_memory_stats"):
    setattr(cuda, name, lambda *args, **kwargs: None)
