"""How many logits the lm-head keeps for the backward pass: a number, or what an update was seen to leave free."""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
import torch.distributed as dist

from flowrl_mega.model.policy import Policy

MEASURED_AT = 2  # the first update during which the optimizer's moments exist
SHARE = 0.5  # of what is free: the next micro-batch may be larger, and caching allocators leave gaps


class Memory(NamedTuple):
    """A GPU's memory, in bytes."""

    free: int  # that nobody has
    reserved: int  # that this process has
    peak: int  # the most of it that was in use at a time

    @classmethod
    def now(cls) -> Memory:
        return cls(torch.cuda.mem_get_info()[0], torch.cuda.memory_reserved(), torch.cuda.max_memory_allocated())

    @property
    def spare(self) -> int:
        """What this process could have had beside its peak."""
        return max(0, self.free + self.reserved - self.peak)


class LogitsBudget:
    """`model.logits_budget_mb` of the policy: `auto` begins with the usual 256 MB, and once an update has been seen
    adds half of the memory that it left free, of the rank where this is least. On a CPU it stays.

    Which logits are kept changes no bit of what is computed: a resumed run may measure anew.
    """

    def __init__(self, policy: Policy, setting: int | Literal["auto"]) -> None:
        self.policy = policy
        is_measured = setting == "auto" and policy.layout.device.type == "cuda"
        self.memory: Callable[[], Memory] | None = Memory.now if is_measured else None

    def after_update(self, updates: int) -> None:
        """Measures, once, when the model has made MEASURED_AT updates or more. Collective."""
        if self.memory is None or updates < MEASURED_AT:
            return
        spare = torch.tensor(self.memory().spare, device=self.policy.layout.device)
        dist.all_reduce(spare, dist.ReduceOp.MIN)
        self.policy.logits_budget_bytes += int(SHARE * spare.item())
        self.memory = None
        if self.policy.layout.rank == 0:
            megabytes = self.policy.logits_budget_bytes >> 20
            print(f"log-probs: {megabytes} MB of logits are kept from here on", file=sys.stderr)
