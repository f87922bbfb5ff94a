"""A CPU process that takes itself for one with an H100, as far as Transformer Engine and our backends.py look."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import torch

H100 = SimpleNamespace(
    major=9, minor=0, multi_processor_count=132, name="NVIDIA H100 80GB HBM3 (emulated)", total_memory=80 << 30
)
# All others see no GPU: cuda_is_cpu.py is to make "cuda" mean "cpu", which is where the emulated one has its memory.
TOLD_OF_IT = ("flowrl_mega.parallel.backends", "transformer_engine.")


def asked_by_one_of_them() -> bool:
    return str(sys._getframe(2).f_globals.get("__name__")).startswith(TOLD_OF_IT)


def install() -> None:
    """Before anything asks for a GPU. What cuda_is_cpu.py replaces as well is left to it."""
    cuda: Any = torch.cuda
    cuda.is_available = lambda: asked_by_one_of_them()
    cuda.get_device_properties = lambda *args, **kwargs: H100
    cuda.get_device_capability = lambda *args, **kwargs: (H100.major, H100.minor)
    cuda.get_device_name = lambda *args, **kwargs: H100.name
    cuda.is_current_stream_capturing = lambda: False
    for name in ("range_push", "range_pop", "mark"):
        setattr(cuda.nvtx, name, lambda *args, **kwargs: None)
    library: Any = torch
    library.get_autocast_gpu_dtype = lambda: torch.bfloat16
    library.version.cuda = "13.0"
    library.Tensor.cuda = lambda self, *args, **kwargs: self
    library.Tensor.is_cuda = property(lambda self: asked_by_one_of_them())
