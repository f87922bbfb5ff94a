"""What Transformer Engine imports but nothing here calls: Triton, for kernels, and onnxscript, to export models.

They are 300 MB, and only decorate functions as they are imported. A kernel that is launched all the same fails by its
name; whoever imports them afterwards finds them missing, as before.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import MagicMock

NAMES = (
    "triton", "triton.language", "triton.language.core", "triton.language.standard", "onnx", "onnxscript",
)  # fmt: skip


class Kernel:
    """A function for the GPU."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self.name = function.__name__

    def __getitem__(self, grid: Any) -> None:
        raise NotImplementedError(f"Triton kernel {self.name}: not emulated")


def jit(function: Callable[..., Any] | None = None, **options: Any) -> Any:
    return Kernel if function is None else Kernel(function)


@contextmanager
def importable() -> Iterator[None]:
    modules: dict[str, Any] = {name: MagicMock(name=name) for name in NAMES if name not in sys.modules}
    if "triton" in modules:
        modules["triton"].__version__ = "3.5.0"
        modules["triton"].jit = jit
        modules["triton"].autotune = modules["triton"].heuristics = lambda *args, **kwargs: lambda kernel: kernel
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
