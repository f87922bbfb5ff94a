"""Stands for SGLang's compiled kernels, which have no wheel for a CPU without AMX.

SGLang imports many of them by name and, with attention backend torch_native, calls none: each is a function that says
so when called. A real sgl_kernel, where there is one, is found before this one.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

__version__ = "0.4.10"


def __getattr__(name: str) -> Callable[..., Any]:
    if name.startswith("__"):
        raise AttributeError(name)

    def kernel(*args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError(f"sgl_kernel.{name}: there is no CPU kernel here; choose settings that do not use it")

    kernel.__name__ = name
    return kernel
