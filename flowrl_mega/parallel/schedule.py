"""Forward and backward over the micro-batches of one update, on Megatron's own schedules (1F1B, interleaved)."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from torch import Tensor

B = TypeVar("B")  # a micro-batch, of whatever type the forward and the loss take

# (a stage's model, micro-batch) -> hidden states for the next stage; of the last stage whatever `LossFunction` takes
Forward = Callable[[Any, B], Any]
# (the last stage's outputs, micro-batch) -> (sum of the losses of its sequences, their number, anything to report)
LossFunction = Callable[[Any, B], tuple[Tensor, int, Any]]


def forward_backward(
    model: list[DistributedDataParallel], batches: list[B], forward: Forward[B], loss: LossFunction[B]
) -> list[Any]:
    """Gradients of (sum of losses) / (number of sequences), both over all micro-batches and data-parallel ranks.

    Megatron divides by what it calls tokens (calculate_per_token_loss); we hand it the number of sequences. `model`
    are this rank's pipeline stages. Returns what `loss` reported, by micro-batch; [] but on the last stage.
    """
    config = model[0].config
    config.finalize_model_grads_func = _finalize
    config.no_sync_func = model[0].no_sync if len(model) == 1 else [stage.no_sync for stage in model]
    if model[0].ddp_config.overlap_grad_reduce:
        # Of a pipeline's stages the first starts its sums in its last backward, and the others then with it.
        starts = [stage.start_grad_sync for stage in model]
        config.grad_sync_func = starts[0] if len(model) == 1 else starts

    def after(output: Any, batch: B) -> tuple[Tensor, Tensor, Any]:
        total, count, report = loss(output, batch)
        # Filled on the device: a number copied to a GPU waits for it, and the backward could not be launched ahead.
        return total, torch.full((), count, dtype=torch.int, device=total.device), report

    return _run(model, batches, forward, after, forward_only=False)


def _finalize(model: list[DistributedDataParallel], *args: Any, **kwargs: Any) -> None:
    """Megatron's, which takes it that the backward has started the sums of every bucket. It starts those alone whose
    parameters have all had a gradient; an objective's loss need not read every one."""
    for bucket in (bucket for stage in model for bucket in stage.bucket_groups if stage.ddp_config.overlap_grad_reduce):
        if len(bucket.per_param_grad_ready_counts) < len(bucket.params):
            bucket.per_param_grad_ready_counts.clear()  # what it would take for all that is to come
            if not bucket.is_first_batch and bucket.grad_reduce_handle is None:
                bucket.start_grad_sync()
    finalize_model_grads(model, *args, **kwargs)
    _average_over_tp(model)


def _average_over_tp(model: list[DistributedDataParallel]) -> None:
    """Gradients of heads that every tensor-parallel rank computes whole, from sums that a GPU makes in any order: their
    last bits differ, and so would the copies of the weights. Megatron's own average needs NCCL."""
    group = parallel_state.get_tensor_model_parallel_group()
    heads = [p.main_grad for stage in model for p in stage.parameters() if getattr(p, "computed_by_all", False)]
    if heads and group.size() > 1:
        whole = torch.cat([gradient.view(-1) for gradient in heads])
        dist.all_reduce(whole, group=group)
        for gradient, mean in zip(heads, (whole / group.size()).split([g.numel() for g in heads]), strict=True):
            gradient.view(-1).copy_(mean)


def forward_only(stages: list[Any], batches: list[B], forward: Forward[B]) -> list[Any]:
    """What the last stage gives, by micro-batch; [] on the other stages. No backward follows."""

    def after(output: Any, batch: B, non_loss_data: bool) -> Any:
        return output

    return _run(stages, batches, forward, after, forward_only=True)


def _run(stages: list[Any], batches: list[B], forward: Forward[B], after: Any, forward_only: bool) -> list[Any]:
    def step(batches: Iterator[B], stage: Any) -> tuple[Any, Any]:
        batch = next(batches)
        return forward(stage, batch), partial(after, batch=batch)

    iterators = [iter(batches) for _ in stages]
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(stages) > 1 else iterators[0],
        model=stages,
        num_microbatches=len(batches),
        seq_length=1,  # stages tell each other the shapes of what they send (variable_seq_lengths)
        micro_batch_size=1,
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
