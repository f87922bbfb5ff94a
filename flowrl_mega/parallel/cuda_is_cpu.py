"""Megatron-core on a machine without CUDA: the device "cuda" means "cpu".

megatron-core has no CPU switch, but nothing in its training path needs a GPU. `install()` must run before the first
`import megatron.core`; where CUDA is present it does nothing, so a cluster never sees this module's effects.
Replaced are entry points of `torch.cuda`, plus one TorchFunctionMode that rewrites device arguments
(the mechanism of `torch.set_default_device`). The mode is per thread.
"""

from __future__ import annotations

import contextlib
import importlib.util
import logging
import sys
import types
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

_CPU = torch.device("cpu")


def _is_cuda(device: Any) -> bool:
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, torch.device) and device.type == "cuda"


class _CudaIsCpu(TorchFunctionMode):
    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = dict(kwargs, device=_CPU)
        if func is torch.Tensor.cuda:
            return args[0]
        if func is torch.Tensor.to and len(args) > 1 and _is_cuda(args[1]):
            args = (args[0], _CPU, *args[2:])
        if func is torch.Tensor.type and len(args) == 1 and not kwargs:
            # Megatron's gradient clip sorts tensors by the names of CUDA's tensor types.
            return func(*args).replace("torch.", "torch.cuda.", 1)
        return func(*args, **kwargs)


class _Done:
    """Stands for a CUDA stream or event: on CPU everything has already happened."""

    cuda_stream = 0

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...

    def __enter__(self) -> _Done:
        return self

    def __exit__(self, *args: Any) -> None: ...

    def _nothing(self, *args: Any, **kwargs: Any) -> None: ...

    wait_stream = wait_event = record = wait = synchronize = _nothing

    def record_event(self, *args: Any) -> _Done:
        return _Done()

    def query(self) -> bool:
        return True

    def elapsed_time(self, other: _Done) -> float:
        return 0.0


_MODE: _CudaIsCpu | None = None


def install() -> bool:
    """Make "cuda" mean "cpu" in this process and thread; True when it was needed. Safe to call again."""
    global _MODE
    if _MODE is not None or torch.cuda.is_available():
        return _MODE is not None
    _replace_devices()
    _replace_random()
    _stub_triton()
    _MODE = _CudaIsCpu()
    _MODE.__enter__()
    with _uncompiled(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of Transformer Engine and Apex being absent, once for each module
        _replace_megatron_random()
    return True


@contextlib.contextmanager
def _uncompiled() -> Iterator[None]:
    """Megatron decorates its fused functions with torch.compile as it is imported. No fusion is used on CPU, and
    without this each process would spend two seconds importing the compiler."""
    library: Any = torch
    original = library.compile
    library.compile = lambda model=None, **_: model or (lambda function: function)
    try:
        yield
    finally:
        library.compile = original


@contextlib.contextmanager
def paused() -> Iterator[None]:
    """Without the mode: each torch call is 1-2 us cheaper, which is 10-25 % of a small model's decode step."""
    if _MODE is None:
        yield
        return
    _MODE.__exit__(None, None, None)
    try:
        yield
    finally:
        _MODE.__enter__()


def _replace_devices() -> None:
    cuda: Any = torch.cuda
    cuda.current_device = lambda: _CPU
    cuda.device_count = lambda: 1
    for name in ("set_device", "synchronize", "empty_cache"):
        setattr(cuda, name, lambda *args, **kwargs: None)  # one function each: torch's compiler keys on identity
    for name in ("current_stream", "default_stream"):
        setattr(cuda, name, lambda *args, **kwargs: _Done())
    cuda.Stream = cuda.Event = _Done
    cuda.stream = lambda stream: contextlib.nullcontext()
    module: Any = torch.nn.Module
    module.cuda = lambda self, device=None: self


def _replace_random() -> None:
    """The "CUDA generator" is the CPU's default generator."""
    cuda: Any = torch.cuda
    generator = torch.default_generator

    def get_rng_state(device: Any = "cuda") -> torch.Tensor:
        return generator.get_state()

    def set_rng_state(state: torch.Tensor, device: Any = "cuda") -> None:
        generator.set_state(state)

    def manual_seed(seed: int) -> None:
        generator.manual_seed(int(seed))

    for place in (cuda, cuda.random):
        place.get_rng_state, place.set_rng_state, place.manual_seed = get_rng_state, set_rng_state, manual_seed


def _replace_megatron_random() -> None:
    """Megatron's random-state tracker writes through torch.cuda's lazy calls, which never fire without CUDA."""
    import megatron.core.tensor_parallel.random as random

    generator = torch.default_generator

    def set_state(new_state: torch.Tensor, device: Any = -1, graph_safe: bool = False) -> None:
        generator.set_state(new_state)

    def get_state(device: Any = "cuda", clone: bool = False, graph_safe: bool = False) -> torch.Tensor:
        return generator.get_state()

    random._set_cuda_rng_state, random._get_cuda_rng_state = set_state, get_state
    logging.getLogger(random.__name__).setLevel(logging.ERROR)  # warns that "CUDA" draws change the CPU's state


def _stub_triton() -> None:
    """megatron-core 0.19 imports a Triton kernel of its mixture-of-experts code unconditionally."""
    if importlib.util.find_spec("triton") is not None:
        return
    name = "megatron.core.transformer.moe.ops.paged_stash"
    module: Any = types.ModuleType(name)
    module.GLOBAL_BLOCK_SIZE = 1024
    module.paged_stash_copy_kernel = module.paged_stash_pop_kernel = None
    sys.modules.setdefault(name, module)
