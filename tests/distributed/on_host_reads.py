"""What ranks run to count what of an update's forward and backward would wait for a GPU."""

from __future__ import annotations

import traceback
from collections import Counter
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from attention_over_ranks import attention_over_ranks
from on_ranks import start
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl_mega import learner
from flowrl_mega.ops import checks

aten = torch.ops.aten
T = torch.Tensor
# On a GPU all of these wait: values that the host asks for, results whose size depends on values, and numbers that are
# copied from the host's ordinary memory.
READS = {T.item, T.tolist, T.__int__, T.__float__, T.__bool__, T.__index__, T.cpu, T.numpy, torch.equal, torch.allclose}
COPIES = {torch.tensor, torch.as_tensor, torch.from_numpy}
KERNELS = {aten._local_scalar_dense, aten.nonzero, aten.masked_select, aten._unique2, aten.unique_dim, aten.is_nonzero}


class Waits(TorchFunctionMode):
    """Counts by the line of the package or of Megatron that did it."""

    def __init__(self) -> None:
        super().__init__()
        self.found: Counter[str] = Counter()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS or (func in COPIES and (kwargs or {}).get("device") is not None):
            self.note(func.__name__)
        return func(*args, **(kwargs or {}))

    def note(self, what: str) -> None:
        places = [Path(frame.filename) for frame in traceback.extract_stack()]
        ours = [path.name for path in places if {"flowrl_mega", "megatron"} & set(path.parts[:-1])]
        ours = [name for name in ours if name != "cuda_is_cpu.py"]  # which all calls pass through
        # What stands for Transformer Engine's ring of GPUs; and of random numbers Megatron reads the CPU's state alone.
        if "attention_over_ranks.py" not in {path.name for path in places} and ours[-1] != "random.py":
            self.found[f"{what} at {ours[-1]}"] += 1


class WaitingKernels(TorchDispatchMode):
    def __init__(self, waits: Waits) -> None:
        super().__init__()
        self.waits = waits

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        unsized = func is aten.repeat_interleave.Tensor and kwargs.get("output_size") is None
        by_mask = func is aten.index.Tensor and any(i is not None and i.dtype == torch.bool for i in args[1])
        if func.overloadpacket in KERNELS or unsized or by_mask:
            self.waits.note(str(func))
        return func(*args, **kwargs)


def waits_of_updates(path: Path, sections: dict[str, Any]) -> dict[str, int]:
    """Of the second step's updates: the first has made what is made once."""
    stand_in = sections.get("parallel", {}).get("cp", 1) > 1
    with attention_over_ranks() if stand_in else nullcontext():
        run = start(path, steps=2, **sections)
    run.trainer.step()
    waits, real, real_flagged = Waits(), learner.forward_backward, checks._flagged

    def watched(*arguments: Any) -> Any:
        with waits, WaitingKernels(waits):
            return real(*arguments)

    learner.forward_backward = watched  # type: ignore[assignment]
    checks._flagged = lambda wrong: False  # of the CPU; on a GPU what is wrong is left there for later
    try:
        run.trainer.step()
    finally:
        learner.forward_backward, checks._flagged = real, real_flagged  # type: ignore[assignment]
        run.close()
    return dict(waits.found)
