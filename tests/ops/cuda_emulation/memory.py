"""Tensors in memory of their own, as a GPU's allocator would place them, where an access beyond the end is seen."""

from __future__ import annotations

import ctypes
import mmap

import torch
from torch import Tensor

START = 16  # of its multiples in bytes a tensor begins at one
PROT_NONE, MAP_NORESERVE = 0, 0x4000  # Linux's, which the module mmap lacks
FILLED = 1 << 30  # bytes; what is larger costs no memory until it is touched
mprotect = ctypes.CDLL(None, use_errno=True).mprotect


def guarded(*sizes: int, dtype: torch.dtype) -> Tensor:
    """All NaN, and so are the bytes around it; from the next multiple of START on there is a page without access."""
    count = torch.Size(sizes).numel()
    size = -(-count * dtype.itemsize // START) * START
    pages = -(-size // mmap.PAGESIZE) * mmap.PAGESIZE
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE
    whole = torch.frombuffer(mmap.mmap(-1, pages + mmap.PAGESIZE, flags), dtype=torch.uint8)
    if mprotect(ctypes.c_void_p(whole.data_ptr() + pages), ctypes.c_size_t(mmap.PAGESIZE), PROT_NONE):
        raise OSError(ctypes.get_errno(), "mprotect")
    mine = whole[pages - size : pages]
    if pages < FILLED:
        whole[:pages] = 0xFF
    return mine.view(dtype)[:count].view(sizes)
