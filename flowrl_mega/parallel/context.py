"""Context parallelism: assemble what needs whole sequences on every rank.

Log-probs and the prompt's sums are summed over the ranks before anything that is not linear in them (the square of the
residual, log Z). From there on every rank computes the same, so the losses of a group add up to cp times the loss.
`all_reduce_grad` is differentiated as what it is, a sum over ranks that all use it: every gradient is cp times too, and
so is the number of sequences that Megatron divides by.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.parallel.packing import PackedBatch


def whole_response(values: Tensor, batch: PackedBatch, group: dist.ProcessGroup) -> Tensor:
    """This rank's values, one per response token -> all ranks' values [R], in the batch's order, on every rank."""
    if batch.response_index is None:
        return values
    whole = values.new_zeros(batch.response_offsets[-1])
    return all_reduce_grad(whole.index_copy(0, batch.response_index, values), group)


def all_reduce_grad(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce (sum) over `group`; its gradient is the all-reduce of the gradients."""
    return tensor if group.size() == 1 else _AllReduceGrad.apply(tensor, group)


class _AllReduceGrad(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        ctx.group = group
        return _AllReduceGrad._sum(tensor, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _AllReduceGrad._sum(grads[0], ctx.group), None

    @staticmethod
    def _sum(tensor: Tensor, group: dist.ProcessGroup) -> Tensor:
        tensor = tensor.clone()
        dist.all_reduce(tensor, group=group)
        return tensor
