"""The stream of prompts over real ranks: each replica reads its shard, and every rank gets them all in order."""

from __future__ import annotations

from typing import Any

import pytest

from flowrl_mega.config import ParallelSettings
from flowrl_mega.data.loader import MmapLoader
from flowrl_mega.data.order import permutation
from flowrl_mega.data.prompts import Prompt
from flowrl_mega.data.stream import Stream
from flowrl_mega.parallel import layout as layouts

pytestmark = pytest.mark.ranks
SIZE, SEED = 11, 3


def drawn(parallel: dict[str, int], sizes: list[int], state: dict[str, Any] | None) -> tuple[list[Any], Any, int]:
    """In a rank: what comes in draws of these sizes, the state afterwards, and how many this rank's loader read."""
    layout = layouts.init(ParallelSettings(**parallel), 0)
    prompts = [Prompt(i, [i, i + 1], {}) for i in range(SIZE)]
    loader = MmapLoader(prompts, SEED, layout.dp_rank, layout.dp)
    stream = Stream(loader, layout)
    if state:
        stream.load_state_dict(state)
    before = loader.taken
    return [item for n in sizes for item in stream.next(n)], stream.state_dict(), loader.taken - before


def expected(positions: range) -> list[tuple[int, list[int]]]:
    """By the definition alone: epochs of numpy's order, one after the other."""
    order = [int(i) for epoch in range(4) for i in permutation(SEED, epoch, SIZE)]
    return [(order[position], [order[position], order[position] + 1]) for position in positions]


@pytest.mark.parametrize("parallel", [{"dp": 2}, {"tp": 2}])
def test_replicas_read_shares_and_ranks_get_all(parallel: dict[str, int], ranks2) -> None:
    """Draws of any size, over the ends of epochs; with two replicas each loader reads half of it."""
    (first, _, read), (second, _, _) = ranks2.run(drawn, parallel, [1, 4, 0, 9, 7], None)
    assert first == second == expected(range(21))
    assert read == (11 if "dp" in parallel else 21)


@pytest.mark.parametrize(("before", "after"), [({"dp": 2}, {"dp": 2}), ({"dp": 2}, {"tp": 2}), ({"tp": 2}, {"dp": 2})])
def test_it_goes_on_with_any_number_of_replicas(before: dict[str, int], after: dict[str, int], ranks2) -> None:
    """A checkpoint of one layout continues in another at the very next prompt, in the middle of an epoch."""
    (_, state, _), (_, other, _) = ranks2.run(drawn, before, [5, 4], None)
    taken = [{"taken": 5}, {"taken": 4}] if "dp" in before else [{"taken": 9}]
    assert state == other == {"place": 9, "loaders": taken}, "as checkpoints have always held it"
    (found, _, _), _ = ranks2.run(drawn, after, [3, 6], state)
    assert found == expected(range(9, 18))
