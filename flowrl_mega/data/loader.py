"""Loaders read prompts: an endless stream of epochs, sharded over the data-parallel ranks.

An epoch is a permutation of the data set by (seed, epoch). The stream is one epoch after the other, and shard s of S
has the positions s, s + S, s + 2S, ... of it: the union over the shards is each epoch exactly once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, overload

import numpy as np

from flowrl_mega.config import ConfigError
from flowrl_mega.data.order import index_at
from flowrl_mega.data.prompts import Prompt, Prompts


class Loader(Protocol):
    """One shard of the stream; the same seed and state give the same prompts."""

    def next(self, n: int) -> list[Prompt]:
        """The shard's next `n` prompts."""

    def state_dict(self) -> dict[str, Any]:
        """This shard's state, in values that JSON can hold."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called. Raises ConfigError for a state that this loader cannot continue."""

    def close(self) -> None:
        """End the loader's threads and release its memory."""


class MmapLoader:
    """Looks prompts up when they are asked for: nothing is read ahead, and the state is one number."""

    def __init__(self, prompts: Prompts, seed: int, shard: int = 0, shards: int = 1) -> None:
        assert 0 <= shard < shards
        self.prompts, self.seed, self.shard, self.shards = prompts, seed, shard, shards
        self.taken = 0  # prompts of this shard that `next` has returned

    def next(self, n: int) -> list[Prompt]:
        positions = (self.shard + self.shards * i for i in range(self.taken, self.taken + n))
        self.taken += n
        return [self.prompts[index_at(position, self.seed, len(self.prompts))] for position in positions]

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.taken = taken(state)

    def close(self) -> None: ...


def taken(state: dict[str, Any]) -> int:
    """How many prompts a shard has returned, from the state of either loader that follows the permutation.

    Those resume each other's runs. ConfigError for the state of DALI's own shuffle buffer.
    """
    if "checkpoint" in state:
        raise ConfigError(
            "data.loader: the state to resume from is that of DALI's own shuffle buffer, whose order no other loader "
            "can continue; set data.loader=dali and data.dali.shuffle=reader, or start a new run"
        )
    return state["taken"]


def whole(prompts: Prompts) -> Prompts:
    """The whole data set that `prompts` are taken from: `Prompt.index` is an index into it."""
    return prompts.prompts if isinstance(prompts, Subset) else prompts


class Subset(Sequence[Prompt]):
    """Some prompts of a data set, such as those that are not held out. Their `index` stays that in the data set.

    `indices`: [n] int64, into `prompts`.
    """

    def __init__(self, prompts: Prompts, indices: Sequence[int] | np.ndarray) -> None:
        self.prompts, self.indices = prompts, np.asarray(indices, np.int64)

    def __len__(self) -> int:
        return len(self.indices)

    @overload
    def __getitem__(self, index: int) -> Prompt: ...
    @overload
    def __getitem__(self, index: slice) -> list[Prompt]: ...
    def __getitem__(self, index: int | slice) -> Prompt | list[Prompt]:
        if isinstance(index, slice):
            return [self.prompts[i] for i in self.indices[index].tolist()]
        return self.prompts[int(self.indices[index])]
