"""The module transformer_engine_torch: all that is emulated under its names. Anything else fails by its name."""

from __future__ import annotations

import types
from typing import Any

from transformer_engine_emulation import attention, elementwise, enumerations, gemm, quantization


class FP8TensorMeta:
    """Filled by Transformer Engine."""

    scale = scale_inv = amax_history = None


class NotEmulated:
    """A function or class of the native module. It can be imported."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        raise NotImplementedError(f"transformer_engine_torch.{self.name}: not emulated")


def not_emulated(name: str) -> NotEmulated:
    if name.startswith("__"):
        raise AttributeError(name)
    return NotEmulated(name)


def module() -> types.ModuleType:
    native: Any = types.ModuleType("transformer_engine_torch")
    for part in (quantization, gemm, elementwise, attention, enumerations):
        for name, value in vars(part).items():
            if getattr(value, "__module__", None) == part.__name__:
                setattr(native, name, value)
    native.FP8TensorMeta = FP8TensorMeta
    native.get_cudnn_version = lambda: 91900
    native.get_cublasLt_version = lambda: 130100
    native.get_num_cublas_streams = lambda: 4
    native.__getattr__ = not_emulated
    return native
