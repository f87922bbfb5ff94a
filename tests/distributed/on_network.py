"""What ranks run to try their network."""

from __future__ import annotations

import os
import time
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed as dist
from on_ranks import sums_left_out

from flowrl_mega import network
from flowrl_mega.config import ParallelSettings
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.layout import Layout


def lines(parallel: dict[str, Any], hosts: int = 1) -> tuple[list[str], list[str], int]:
    """What is said where the ranks seem to be on so many hosts; the groups of several ranks; bytes summed over them."""
    layout, summed, real = _layout(parallel), [], dist.all_reduce

    def all_reduce(tensor: torch.Tensor, group: Any = None) -> None:
        summed.append(tensor.numel() * tensor.element_size())
        real(tensor, group=group)

    with (
        patch.dict(os.environ, LOCAL_WORLD_SIZE=str(layout.world // hosts)),
        patch.object(dist, "all_reduce", all_reduce),
    ):
        return network.check_network(layout), list(network._groups(layout)), sum(summed)


def silent(parallel: dict[str, Any], group: str, limit_s: float) -> str:
    """What rank 0 says of a group in which the last rank is silent for longer than the limit."""
    layout = _layout(parallel)
    silent_one = network._groups(layout)[group]
    store = dist.distributed_c10d._get_default_store()
    if layout.rank < layout.world - 1:
        try:
            network.check_network(layout, limit_s)
        except network.RunError as error:
            said = str(error)
            store.set("said", said)
    else:
        said = ""
        for name, before in network._groups(layout).items():
            if name == group:
                break
            network._sum(layout, before, 1, repeats=1)
        network._hosts(layout)
    store.wait(["said"])
    if layout.rank == layout.world - 1:  # so that the other's thread ends
        network._sum(layout, silent_one, 1, repeats=1)
    time.sleep(0.1)
    store.delete_key("said")
    return said


def corrupt(parallel: dict[str, Any]) -> str:
    """What is said where a group's sums are not made."""
    layout = _layout(parallel)
    group = layout.tp_group
    with sums_left_out(lambda summed: summed is group):
        try:
            network.check_network(layout)
        except network.RunError as error:
            return str(error)
    return ""


def _layout(parallel: dict[str, Any]) -> Layout:
    torch.set_num_threads(1)
    return layouts.init(ParallelSettings(**parallel), seed=0)
