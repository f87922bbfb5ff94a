"""The order in which prompts are served."""

from __future__ import annotations

from functools import lru_cache

import numpy as np


def index_at(position: int, seed: int, size: int) -> int:
    """The index, among `size` prompts, of the one at `position` of the endless stream."""
    epoch, item = divmod(position, size)
    return int(permutation(seed, epoch, size)[item])


@lru_cache(maxsize=4)
def permutation(seed: int, epoch: int, size: int) -> np.ndarray:
    """The order of one epoch, [size] int64. Raw PCG64 output: the part of numpy that never changes with its version."""
    keys = np.random.PCG64([seed, epoch]).random_raw(size)
    return np.argsort(keys, kind="stable")
