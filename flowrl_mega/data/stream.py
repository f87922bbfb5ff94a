"""The endless stream of prompts as all ranks see it; each data-parallel replica's loader reads one shard of it."""

from __future__ import annotations

from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.data.loader import Loader
from flowrl_mega.parallel.layout import Layout


class Stream:
    """All methods but `close` are collective; `loader` reads shard `layout.dp_rank` of `layout.dp`."""

    def __init__(self, loader: Loader, layout: Layout) -> None:
        self.loader, self.layout = loader, layout
        self.position = 0  # of the next prompt, over all shards

    def next(self, n: int) -> list[tuple[int, list[int]]]:
        """(index in the data set, token ids) of the stream's next `n` prompts, on every rank."""
        layout, positions = self.layout, range(self.position, self.position + n)
        mine = self.loader.next(sum(position % layout.dp == layout.dp_rank for position in positions))
        parts = layout.gather_objects((layout.dp_rank, [(prompt.index, prompt.token_ids) for prompt in mine]))
        shards = {dp_rank: iter(part) for dp_rank, part in parts}
        self.position += n
        return [next(shards[position % layout.dp]) for position in positions]

    def state_dict(self) -> dict[str, Any]:
        """{"place": position of the next prompt, "loaders": states by shard}, the same on every rank."""
        parts = dict(self.layout.gather_objects((self.layout.dp_rank, self.loader.state_dict())))
        return {"place": self.position, "loaders": [parts[shard] for shard in range(self.layout.dp)]}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`, with the same number of replicas or, if loaders only count, with any number.

        "loaders" may be missing: old checkpoints have the position alone. ConfigError if the number must be the same.
        """
        self.position, states = state["place"], state.get("loaders")
        if states and len(states) == self.layout.dp:
            self.loader.load_state_dict(states[self.layout.dp_rank])
        elif not states or all(of.keys() == {"taken"} for of in states):
            self.loader.load_state_dict({"taken": len(range(self.layout.dp_rank, self.position, self.layout.dp))})
        else:
            raise ConfigError(
                f"parallel.dp = {self.layout.dp}: the checkpoint has the reader states of {len(states)} shards, which "
                f"only dp = {len(states)} can go on from; take that, or data.dali.shuffle=index from the start"
            )

    def close(self) -> None:
        self.loader.close()
