"""What the ranks of a pool run; module-level functions, so that they can be sent."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

import flowrl_mega.parallel  # noqa: F401  before megatron is imported

# isort: split
from megatron.core.tensor_parallel import layers, mappings
from torch import Tensor

from flowrl_mega.config import Config, LogZ
from flowrl_mega.experience import MicroBatch
from flowrl_mega.metrics import Max, Mean
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.names import from_shards, hf_names, to_named
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.precision import row_alignment
from flowrl_mega.model.stage import Model
from flowrl_mega.model.weights import load_hf
from flowrl_mega.monitor.step_metrics import merge_updates
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.packing import PackedBatch, Sequence, pack, plan
from flowrl_mega.preflight import Inputs
from flowrl_mega.run import Run
from flowrl_mega.settings import validated


def config_for(path: Path | str, **sections: Any) -> Config:
    """Settings with the model at `path`; sections as keyword arguments."""
    tree = {
        "run_dir": "unused",
        "steps": 1,
        "model": {"path": str(path)},
        "data": {"task": "sums"},
        "reward": "flowrl_mega.rewards.sums:score",
        **sections,
    }
    return validated(Config, tree, "")


def build(path: Path | str, log_z: Any = None, **sections: Any) -> Policy:
    """The policy of the Hugging Face folder in the layout that `parallel` says."""
    config = config_for(path, **sections)
    forget_scales()
    layout = layouts.init(config.parallel, config.seed)
    policy = Policy(read_architecture(path), config, layout, LogZ(kind=log_z) if isinstance(log_z, str) else log_z)
    load_hf(policy, path)
    return policy


def forget_scales() -> None:
    """Of an earlier job in this process, with which Transformer Engine would go on reducing over groups of its own."""
    if quantization := sys.modules.get("transformer_engine.pytorch.quantization"):
        quantization.FP8GlobalStateManager.reset()


def packed(policy: Policy, sequences: list[Sequence]) -> PackedBatch:
    return pack(sequences, policy.layout.row_multiple, policy.layout.device)


def score(path: Path, sequences: list[Sequence], temperature: float = 1.0, **sections: Any) -> dict[str, Tensor]:
    """Log-probs and entropies, each with the index of its sequence."""
    policy = build(path, **sections)
    batch = packed(policy, sequences)
    (output,) = policy.score([batch], temperature)
    segment = batch.index.repeat_interleave(batch.response_cu_seqlens.diff())
    return {"logp": output.logp, "entropy": output.entropy, "segment": segment}


def start(path: Path | str, checkpoint: Path | None = None, **sections: Any) -> Run:
    """A run of these settings, before its first step."""
    config = config_for(path, **sections)
    forget_scales()
    layout = layouts.init(config.parallel, config.seed, row_alignment(config.model, config.parallel.sequence_parallel))
    return Run(Inputs(config), layout, checkpoint)


def step_by_updates(path: Path | str, steps: int = 1, **sections: Any) -> list[dict[str, float]]:
    """Whole training steps; the metrics of each of their updates."""
    trainer, found = start(path, **sections).trainer, []
    real = trainer.update

    def update(mini_batch: list[MicroBatch]) -> dict[str, Mean | Max]:
        metrics = real(mini_batch)
        found.append(merge_updates([metrics]))
        return metrics

    trainer.update = update  # type: ignore[method-assign]
    for _ in range(steps):
        trainer.step()
    return found


class Recorded(NamedTuple):
    """All that an update reads of N rollouts, so that no layout can change it; the log-probs by sequence."""

    sequences: list[Sequence]
    credit: Tensor  # [N]
    old_logp: list[Tensor]
    ref_logp: list[Tensor]


class Update(NamedTuple):
    """What one update computed, before the optimizer changed anything."""

    metrics: dict[str, float]
    gradients: dict[str, Tensor]  # whole tensors under Hugging Face names, and "partition...."
    partition: dict[str, Tensor]  # the partition function's weights
    replica_difference: float  # between the ranks' gradients of a tensor that all of them hold
    micro_batches: int
    sums: int  # over more than one rank, forward and backward


def update(path: Path, recorded: Recorded, **sections: Any) -> Update:
    """One update on recorded rollouts."""
    return _update(*_prepare(path, recorded, sections), leave_out=None)


def updates_short_of_one(path: Path, recorded: Recorded, **sections: Any) -> list[Update]:
    """The update without its first sum over ranks, without its second, ...; the last one is complete."""
    job, batches = _prepare(path, recorded, sections)
    complete = _update(job, batches, leave_out=None)
    return [*(_update(job, batches, leave_out) for leave_out in range(complete.sums)), complete]


def _prepare(path: Path, recorded: Recorded, sections: dict[str, Any]) -> tuple[Run, list[MicroBatch]]:
    job = start(path, **sections)
    sequences, budget = recorded.sequences, job.config.batch.tokens_per_microbatch
    (batches,) = plan(sequences, len(sequences), job.layout, budget)
    return job, [
        MicroBatch(
            batch,
            credit=recorded.credit[batch.index],
            group=batch.index,
            old_logp=torch.cat([recorded.old_logp[i] for i in batch.index.tolist()]),
            ref_logp=torch.cat([recorded.ref_logp[i] for i in batch.index.tolist()]),
        )
        for batch in batches
    ]


def _update(job: Run, batches: list[MicroBatch], leave_out: int | None) -> Update:
    found: dict[str, Any] = {}

    def gather_instead_of_step(loss_is_finite: bool) -> dict[str, Mean]:
        job.models.learner.optimizer.inner.prepare_grads()
        norm = float(job.models.learner.optimizer.inner.get_grad_norm())
        found["gradients"], found["difference"] = whole_gradients(job.models.policy)
        return {"grad_norm": Mean(norm)}

    job.models.learner.optimizer.step = gather_instead_of_step  # type: ignore[method-assign]
    with counted_sums(leave_out) as calls:
        metrics = merge_updates([job.trainer.update(batches)])
    partition = job.models.policy.partition
    partition = {} if partition is None else partition.state_dict()
    partition = job.layout.from_last_stage(partition)
    return Update(metrics, found["gradients"], partition, found["difference"], len(batches), len(calls))


def whole_gradients(policy: Model) -> tuple[dict[str, Tensor], float]:
    """Gradients as whole tensors, and the largest difference between copies that should be equal."""
    layout, whole, difference = policy.layout, {}, 0.0
    for name, parameter in policy.named_parameters():
        shards = [torch.empty_like(parameter.main_grad) for _ in range(layout.tp)]
        dist.all_gather(shards, parameter.main_grad.contiguous(), group=layout.tp_group)
        short = name.removeprefix("gpt.")
        full = from_shards(short, shards)
        if full is shards[0]:
            difference = max([difference, *((s - full).abs().max().item() for s in shards)])
        if short == name:
            whole[name] = full.clone()
        else:
            whole.update(zip(hf_names(short, policy.arch), to_named(short, full.clone(), policy.arch), strict=True))
    if layout.pp == 1:
        return whole, difference
    stages: list[Any] = [None] * layout.pp
    dist.all_gather_object(stages, (whole, difference), group=layout.pp_group)
    copies = _embedding_copies(policy) if policy.stages[0].share_embeddings_and_output_weights else 0.0
    return {name: g for part, _ in stages for name, g in part.items()}, max(copies, *(d for _, d in stages))


def _embedding_copies(policy: Model) -> float:
    """How unlike the gradients of the first and the last stage's copy of the embedding are."""
    layout, mine = policy.layout, None
    for stage in policy.stages:
        if stage.pre_process or stage.post_process:
            mine = stage.shared_embedding_or_output_weight().main_grad.cpu()
    copies: list[Any] = [None] * layout.pp
    dist.all_gather_object(copies, mine, group=layout.pp_group)
    return (copies[0] - copies[-1]).abs().max().item()


class _Done:
    def wait(self) -> None: ...


@contextmanager
def sums_left_out(is_left_out: Callable[[Any], bool]) -> Iterator[None]:
    """All-reduces and reduce-scatters over a group that `is_left_out` give back what the rank itself has put in."""
    real_reduce, real_scatter = dist.all_reduce, mappings.dist_reduce_scatter_func

    def all_reduce(tensor: Tensor, op: Any = dist.ReduceOp.SUM, group: Any = None, async_op: bool = False) -> Any:
        if op == dist.ReduceOp.SUM and is_left_out(group or dist.group.WORLD):
            return _Done() if async_op else None
        return real_reduce(tensor, op=op, group=group, async_op=async_op)

    def reduce_scatter(output: Tensor, whole: Tensor, group: Any = None, **rest: Any) -> Any:
        if is_left_out(group or dist.group.WORLD):
            output.copy_(whole.chunk(dist.get_world_size(group))[dist.get_rank(group)])
            return _Done()
        return real_scatter(output, whole, group=group, **rest)

    dist.all_reduce = all_reduce
    mappings.dist_reduce_scatter_func = layers.dist_reduce_scatter_func = reduce_scatter
    try:
        yield
    finally:
        dist.all_reduce = real_reduce
        mappings.dist_reduce_scatter_func = layers.dist_reduce_scatter_func = real_scatter


@contextmanager
def counted_sums(leave_out: int | None) -> Iterator[list[int]]:
    """The sizes of the groups summed over, of more than one rank; leaves out number `leave_out` everywhere."""
    calls: list[int] = []

    def left_out(group: Any) -> bool:
        if group.size() > 1:
            calls.append(group.size())
        return group.size() > 1 and len(calls) - 1 == leave_out

    with sums_left_out(left_out):
        yield calls
