"""Forward and backward over the micro-batches of one update, on Megatron's own schedule."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

from flowrl_mega.parallel.packing import PackedBatch

# (model, micro-batch) -> (sum of the losses of its sequences, their number, anything to report)
LossFunction = Callable[[Any, PackedBatch], tuple[Tensor, int, Any]]


def forward_backward(model: DistributedDataParallel, batches: list[PackedBatch], loss: LossFunction) -> list[Any]:
    """Gradients of (sum of losses) / (number of sequences), both over all micro-batches and data-parallel ranks.

    Megatron divides by what it calls tokens (calculate_per_token_loss); we hand it the number of sequences. Returns
    what `loss` reported, by micro-batch.
    """
    model.config.finalize_model_grads_func = finalize_model_grads
    model.config.no_sync_func = model.no_sync

    def forward_step(batches: Iterator[PackedBatch], model: Any) -> tuple[Tensor, Any]:
        total, count, report = loss(model, next(batches))
        return total, partial(_normaliser, count=count, report=report)

    return get_forward_backward_func()(
        forward_step_func=forward_step,
        data_iterator=iter(batches),
        model=[model],
        num_microbatches=len(batches),
        seq_length=1,  # read only by pipeline schedules of fixed shapes
        micro_batch_size=1,
        forward_only=False,
    )


def _normaliser(total: Tensor, count: int, report: Any) -> tuple[Tensor, Tensor, Any]:
    return total, torch.tensor(count, dtype=torch.int, device=total.device), report
