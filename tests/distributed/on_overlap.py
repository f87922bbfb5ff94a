"""What ranks run to see when the sums of gradients over ranks begin, and that they are the same."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import flowrl_mega.parallel  # noqa: F401  before megatron is imported

# isort: split
from megatron.core.distributed.param_and_grad_buffer import _ParamAndGradBucketGroup
from megatron.core.pipeline_parallel import schedules
from on_layouts import Trained, walk

from flowrl_mega.experience import Experience, MicroBatch
from flowrl_mega.parallel import optimizer

UPDATE, START, END = "an update begins", "a bucket's sum starts", "a backward ends"


class Seen(NamedTuple):
    """What was trained, and what happened in which order."""

    trained: Trained
    events: list[str]


def overlapped(
    path: Path, steps: list[Experience], case: dict[str, Any], bucket: int | None = None, unread: bool = False
) -> Seen:
    """`bucket`: elements in one, else Megatron's 40 million. `unread`: the loss leaves out the log Z it asked for."""
    with events() as seen, in_buckets(bucket), log_z_without_gradient(unread):
        (trained,) = walk(path, steps, [case])
    return Seen(trained, seen)


@contextmanager
def in_buckets(size: int | None) -> Iterator[None]:
    config = partial(optimizer.DistributedDataParallelConfig, bucket_size=size)
    with patch.object(optimizer, "DistributedDataParallelConfig", config):
        yield


@contextmanager
def events() -> Iterator[list[str]]:
    seen: list[str] = []
    backward, start = schedules.backward_step, _ParamAndGradBucketGroup.start_grad_sync

    def backward_step(*args: Any, **kwargs: Any) -> Any:
        found = backward(*args, **kwargs)
        seen.append(END)
        return found

    def start_grad_sync(self: Any, *args: Any, **kwargs: Any) -> None:
        if self.grad_reduce_handle is None:  # else Megatron asks again for what is under way
            seen.append(START)
        start(self, *args, **kwargs)

    def zero_grad(self: optimizer.Optimizer) -> None:
        seen.append(UPDATE)
        zero(self)

    zero = optimizer.Optimizer.zero_grad
    with (
        patch.object(optimizer.Optimizer, "zero_grad", zero_grad),
        patch.object(schedules, "backward_step", backward_step),
        patch.object(_ParamAndGradBucketGroup, "start_grad_sync", start_grad_sync),
    ):
        yield seen


@contextmanager
def log_z_without_gradient(wanted: bool) -> Iterator[None]:
    real = MicroBatch.loss_inputs

    def loss_inputs(self: MicroBatch, output: Any = None) -> Any:
        inputs = real(self, output)
        return dataclasses.replace(inputs, log_z=inputs.log_z.detach()) if wanted and output else inputs

    with patch.object(MicroBatch, "loss_inputs", loss_inputs):
        yield
