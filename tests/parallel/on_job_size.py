"""What ranks run to tell how long the collectives of their groups may take."""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from flowrl_mega.config import ParallelSettings
from flowrl_mega.parallel import layout as layouts


def timeouts(parallel: dict[str, Any]) -> dict[str, timedelta]:
    """By a group's name, of all that Megatron made for this layout; a group of one rank never waits."""
    layouts._drop_groups()
    layouts.init(ParallelSettings(**parallel), seed=0)
    groups = {name: group for group, name in dist.distributed_c10d._world.pg_names.items()}
    found = {
        name: group._get_backend(torch.device("cpu")).options._timeout
        for name, group in groups.items()
        if group is not dist.group.WORLD and group is not dist.GroupMember.NON_GROUP_MEMBER and group.size() > 1
    }
    layouts._drop_groups()
    return found
