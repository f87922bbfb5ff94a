"""Context parallelism: what needs whole sequences is put together again.

Log-probs and the prompt's sums are added up over the ranks before anything that is not linear in them (the square of
the residual, log Z). From there on every rank computes the same, cp times the losses in all; `total` is differentiated
as what it is, a sum over ranks that all use it, so every gradient is cp times too, and so is the number of sequences
that Megatron divides by.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.parallel.packing import PackedBatch


def whole_response(values: Tensor, batch: PackedBatch, group: dist.ProcessGroup) -> Tensor:
    """Values of this rank's response tokens -> [R], those of all ranks in the batch's order, on every rank."""
    if batch.response_index is None:
        return values
    whole = values.new_zeros(int(batch.response_cu_seqlens[-1]))
    return total(whole.index_copy(0, batch.response_index, values), group)


def total(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The sum over the group's ranks, on all of them; differentiable."""
    return tensor if group.size() == 1 else _Total.apply(tensor, group)


class _Total(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _Total._sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _Total._sum(grads[0], ctx.group), None

    @staticmethod
    def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor
