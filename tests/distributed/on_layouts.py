"""What ranks run to train on recorded rollouts in one layout after another."""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from attention_over_ranks import attention_over_ranks
from on_ranks import start, sums_left_out, whole_gradients
from torch import Tensor

from flowrl_mega.experience import Experience, MicroBatch
from flowrl_mega.monitor.distributions import Residuals
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.run import Run
from flowrl_mega.train import columns_of


class Trained(NamedTuple):
    """What all of it computed, the same in every layout; log-probs [tokens] and log Z by sequence of the first step."""

    old_logp: list[Tensor]
    ref_logp: list[Tensor]
    log_z: Tensor
    gradients: dict[str, Tensor]  # of the first update before it is clipped, under Hugging Face's names
    metrics: list[dict[str, float]]  # of every update
    replica_difference: float  # between copies of a gradient on several ranks
    residuals: Tensor  # [3, sequences] residual, log Z and scale of the first update's; nan for the others


def walk(
    path: Path, steps: list[Experience], cases: list[dict[str, Any]], left_out: str | None = None
) -> list[Trained]:
    """The steps from the same model in every case, by these ranks.

    `left_out` names the process group (tp, dp, cp, dp_cp, embd, mp) over which nothing is summed in the first update.
    """
    found = []
    for case in cases:
        found.append(_train(path, steps, case, left_out))
        gc.collect()  # a trainer is part of cycles, and its groups keep threads until it goes
    return found


def _train(path: Path, steps: list[Experience], case: dict[str, Any], left_out: str | None) -> Trained:
    stand_in = case.get("parallel", {}).get("cp", 1) > 1 and case.get("model", {}).get("spec") != "te"
    with attention_over_ranks() if stand_in else nullcontext():
        job = start(path, **case)
    metrics, first = [], {}
    for step in steps:
        mini_batches = job.trainer.micro_batches(step)
        if not first:
            first = _scores(job, mini_batches, len(step.sequences))
        for mini_batch in mini_batches:
            if "gradients" not in first:
                job.trainer.watched = watched = []
                with without_sums(job, left_out), kept_gradients(job) as kept:
                    metrics.append(merge_updates([job.trainer.update(mini_batch)]))
                job.trainer.watched = None
                seen = Residuals.of_columns(columns_of(watched, len(step.sequences), job.layout))
                assert seen
                residuals = torch.tensor(
                    [seen.residual.tolist(), seen.log_z.tolist(), seen.scale.tolist()], dtype=torch.float64
                )
                first |= kept | {"residuals": residuals}
            else:
                metrics.append(merge_updates([job.trainer.update(mini_batch)]))
    job.close()
    return Trained(metrics=metrics, **first)


def _scores(job: Run, mini_batches: list[list[MicroBatch]], count: int) -> dict[str, Any]:
    """By sequence, gathered from whichever ranks have them."""
    found: dict[str, dict[int, Any]] = {"old_logp": {}, "ref_logp": {}, "log_z": {}}
    batches = [batch for mini_batch in mini_batches for batch in mini_batch]
    outputs = job.models.policy.score([batch.packed for batch in batches], job.config.rollout.temperature)
    for batch, output in zip(batches, outputs, strict=False):
        lengths, order = batch.packed.response_cu_seqlens.diff().tolist(), batch.packed.index.tolist()
        for name in ("old_logp", "ref_logp"):
            found[name].update(zip(order, getattr(batch, name).split(lengths), strict=True))
        found["log_z"].update(zip(order, output.log_z, strict=True))
    merged: dict[str, dict[int, Any]] = {name: {} for name in found}
    for part in job.layout.gather_objects(found):
        for name, values in part.items():
            merged[name].update(values)
    by_index = {name: [values[i].cpu() for i in range(count)] for name, values in merged.items()}
    return {**by_index, "log_z": torch.stack(by_index["log_z"])}


@contextmanager
def kept_gradients(job: Run) -> Iterator[dict[str, Any]]:
    """The update's gradients, read when they are complete and before they are clipped."""
    kept: dict[str, Any] = {}
    real = job.models.learner.optimizer.inner.prepare_grads

    def prepare_grads() -> Any:
        kept["gradients"], kept["replica_difference"] = whole_gradients(job.models.policy)
        return real()

    job.models.learner.optimizer.inner.prepare_grads = prepare_grads
    try:
        yield kept
    finally:
        del job.models.learner.optimizer.inner.prepare_grads


def without_sums(job: Run, left_out: str | None) -> AbstractContextManager[None]:
    """Nothing is summed over this group."""
    layout = job.layout
    members = {"tp": layout.tp_group, "dp": layout.dp_group, "cp": layout.cp_group, "embd": layout.groups.embd}
    members |= {"mp": layout.replica_group, "dp_cp": layout.groups.dp_cp}
    group = members[left_out] if left_out else None
    skipped = dist.get_process_group_ranks(group) if group else []
    return sums_left_out(lambda group: dist.get_process_group_ranks(group) == skipped)
