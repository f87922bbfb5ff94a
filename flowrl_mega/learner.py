"""A model that learns: its stages behind Megatron's gradient buffers, its optimizer, one update of it; and between
packed micro-batches and what objectives see of them."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from flowrl_mega import ops
from flowrl_mega.config import OptimizerSettings
from flowrl_mega.model.policy import PolicyOutput
from flowrl_mega.monitor.step_metrics import reduce_reports
from flowrl_mega.objectives import Sequences
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.optimizer import Optimizer, wrap
from flowrl_mega.parallel.packing import PackedBatch
from flowrl_mega.parallel.schedule import Forward, LossFunction, forward_backward


class Learner:
    """Of the policy, or of a critic with a trunk of its own.

    `total_updates`: after how many a decay of the rate ends. `rates`: learning rates of parameters by pattern of their
    name. Collective, as is `update`.
    """

    def __init__(
        self,
        stages: list[Any],
        settings: OptimizerSettings,
        layout: Layout,
        bf16: bool,
        total_updates: int,
        rates: dict[str, float] | None = None,
    ) -> None:
        self.layout = layout
        self.stages = wrap(stages, settings.distributed)
        self.optimizer = Optimizer(self.stages, settings, bf16, total_updates, rates)

    def update(self, mini_batch: list[PackedBatch], forward: Forward, loss: LossFunction) -> dict[str, float]:
        """One optimizer step on the mean loss over the mini-batch, on all ranks together; its metrics."""
        self.optimizer.zero_grad()
        reports = forward_backward(self.stages, mini_batch, forward, loss)
        # Losses are the last pipeline stage's, and all stages must take or refuse the update together.
        metrics = self.layout.from_last_stage(reports and reduce_reports(reports, self.layout.dp_group))
        ops.raise_if_flagged()  # the metrics have waited for the device already
        return metrics | self.optimizer.step(loss_is_finite=math.isfinite(metrics["loss"]))


def to_sequences(batch: PackedBatch, output: PolicyOutput | None = None) -> Sequences:
    """A micro-batch as objectives see it: with the policy's outputs in an update, without before it."""
    scores = batch.scores
    if output:
        logp, old_logp = output.logp, scores.get("old_logp", output.logp.detach())
    else:
        # What is not scored must not be read: NaN makes of such a mistake a refused update.
        unknown = torch.full((int(batch.response_cu_seqlens[-1]),), math.nan, device=batch.tokens.device)
        logp = old_logp = scores.get("old_logp", unknown)
    return Sequences(
        logp=logp,
        old_logp=old_logp,
        ref_logp=scores.get("ref_logp"),
        log_z=output.log_z if output else None,
        cu_seqlens=batch.response_cu_seqlens,
        credit=scores["credit"],
        rollout_logp=scores.get("rollout_logp"),
        group=scores.get("group"),
        value=scores.get("value"),
        prepared=batch.prepared,
    )


def keep(name: str, batches: list[PackedBatch], values: list[Tensor]) -> None:
    """Beside each micro-batch what the objective reads; only the last pipeline stage has it, and needs it."""
    for batch, value in zip(batches, values, strict=False):
        batch.scores[name] = value


def counts_of(loss_sum: Tensor, count: int, batch: PackedBatch) -> dict[str, Tensor]:
    """What turns a micro-batch's sums into an update's means (`reduce_reports`)."""
    counts = torch.tensor([count, batch.size], device=loss_sum.device)
    return {"loss": loss_sum.detach()[None], "loss_count": counts[:1], "count": counts[1:]}
