"""Tensors that lie in CPU memory while nobody needs them."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor


class Offload:
    """A context in which the tensors are on their device; outside, their contents are in (pinned) CPU memory.

    `tensors` is asked at each entry and exit, as an optimizer makes its moments at its first step. They stay the same
    objects; those that are on the CPU anyway are left alone.
    """

    def __init__(self, tensors: Callable[[], Iterable[Tensor]]) -> None:
        self.tensors = tensors
        self.home: dict[int, torch.device] = {}
        self.leave()

    def __enter__(self) -> Offload:
        for tensor in self.tensors():
            if home := self.home.pop(id(tensor), None):
                tensor.data = tensor.data.to(home, non_blocking=True)
        return self

    def __exit__(self, *_: Any) -> None:
        self.leave()

    def leave(self) -> None:
        """Off the device. Waits for the copies: the memory that they leave is somebody else's next."""
        moved = [tensor for tensor in self.tensors() if tensor.is_cuda]
        for tensor in moved:
            self.home[id(tensor)] = tensor.device
            pinned = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=True)
            tensor.data = pinned.copy_(tensor.data, non_blocking=True)
        if moved:
            torch.cuda.synchronize()
            torch.cuda.empty_cache()
