"""From what micro-batches and updates report to one line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import islice
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.metrics import GroupGap, Max, Mean, Report, Update
from flowrl_mega.parallel.layout import Layout

# Dense bf16, by NVIDIA's data sheets (SXM).
PEAK_TFLOPS = {"GB200": 2500, "B200": 2250, "H200": 989, "H100": 989, "H800": 989, "A100": 312, "A800": 312}


def reduce_reports(reports: Sequence[Report], group: dist.ProcessGroup) -> dict[str, Mean | Max]:
    """An update's metrics from the reports of this rank's micro-batches, the same on every rank of `group`.

    Every report, on every rank, has the same names with the same types. One all-reduce for maxima, one for sums, and
    one for each metric by prompt.
    """
    columns = {name: [report[name] for report in reports] for name in sorted(reports[0])}
    maxima = {name: column for name, column in columns.items() if isinstance(column[0], Max)}
    gaps = {name: column for name, column in columns.items() if isinstance(column[0], GroupGap)}
    means = {name: column for name, column in columns.items() if name not in maxima and name not in gaps}
    reduced_gaps = {name: _reduced_gap(column, group) for name, column in gaps.items()}
    return {**_reduced_maxima(maxima, group), **_reduced_means(means, group), **reduced_gaps}


def _reduced_maxima(columns: Mapping[str, Sequence[Any]], group: dist.ProcessGroup) -> dict[str, Max]:
    """columns: for each name its `Max` of every micro-batch."""
    largest = _all_reduced([_joined(column).max() for column in columns.values()], dist.ReduceOp.MAX, group)
    return {name: Max(value) for name, value in zip(columns, largest, strict=True)}


def _reduced_means(columns: Mapping[str, Sequence[Any]], group: dist.ProcessGroup) -> dict[str, Mean]:
    """columns: for each name its `Mean` or `FromMeans` of every micro-batch."""
    # For each name the means that its figure is made of; each mean a tuple over the micro-batches.
    parts = {name: [*zip(*(metric.means for metric in column), strict=True)] for name, column in columns.items()}
    flat = [part for own in parts.values() for part in own]
    sums = [_joined(part).sum() for part in flat]
    counts = sums[0].new_tensor([sum(mean.count for mean in part) for part in flat])
    totals = _all_reduced([*sums, *counts], dist.ReduceOp.SUM, group)
    means = (total / count for total, count in zip(totals[: len(flat)], totals[len(flat) :], strict=True))
    return {name: Mean(columns[name][0].figure(*islice(means, len(own)))) for name, own in parts.items()}


def _reduced_gap(column: Sequence[Any], group: dist.ProcessGroup) -> Mean:
    """column: a metric's `GroupGap` of every micro-batch."""
    totals = torch.stack([metric.sums for metric in column]).sum(0)
    if group.size() > 1:
        dist.all_reduce(totals, group=group)
    sums, counts = totals[:, totals[1] > 0]  # an update may have some of a step's prompts only
    return Mean(float((sums / counts).abs().mean()))


def _joined(metrics: Sequence[Mean | Max]) -> Tensor:
    return torch.cat([metric.values.reshape(-1) for metric in metrics]).double()


def _all_reduced(numbers: list[Tensor], op: dist.ReduceOp.RedOpType, group: dist.ProcessGroup) -> list[float]:
    if not numbers:
        return []
    stacked = torch.stack(numbers)
    if group.size() > 1:
        dist.all_reduce(stacked, op=op, group=group)
    return stacked.tolist()


def merge_updates(updates: Sequence[Update]) -> dict[str, float]:
    """One number for each metric of a step's updates; a metric that only some updates have is theirs alone."""
    merged = {}
    for name in dict.fromkeys(name for update in updates for name in update):
        found = [update[name] for update in updates if name in update]
        values = [float(metric.values) for metric in found]
        merged[name] = max(values) if isinstance(found[0], Max) else sum(values) / len(values)
    return merged


def cost_metrics(
    seconds: Mapping[str, float], tokens: int, generated: int, memory_gb: Sequence[float]
) -> dict[str, float]:
    """The time and memory that a step took: the only metrics that differ between two runs of the same settings.

    seconds: by phase; they must add up to the step. tokens: prompt and response tokens trained on. generated: response
    tokens; a step that takes groups left by earlier ones generates nothing, and has no rate of it. memory_gb: of every
    rank; the first one's and the largest are told.
    """
    total, generating = sum(seconds.values()), seconds.get("generate", 0.0)
    return {
        **{f"perf/{phase}_seconds": value for phase, value in seconds.items()},
        "perf/step_seconds": total,
        "perf/tokens_per_second": tokens / total,
        **({"perf/generated_tokens_per_second": generated / generating} if generating else {}),
        "perf/memory_gb": memory_gb[0],
        "perf/max_memory_gb": max(memory_gb),
    }


def memory_of_ranks(layout: Layout) -> list[float]:
    """GB of every rank: the peak on a GPU, else what the process holds now. Collective."""
    on_gpu = torch.cuda.is_available()
    mine = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    every = torch.zeros(layout.world, device=layout.device, dtype=torch.float64)
    every[layout.rank] = mine / 1e9
    if layout.world > 1:
        dist.all_reduce(every)
    return [round(value, 6) for value in every.tolist()]


def utilisation(parameters: int, tokens: int, seconds: float, gpus: int, name: str) -> dict[str, float]:
    """{"perf/mfu": the share of the GPUs' dense bf16 peak that an update reaches}: 6 floating-point operations for each
    parameter and token trained on (arXiv 2204.02311, B; without its term for attention). Empty for a GPU whose peak is
    not known here."""
    peak = next((tflops for of, tflops in PEAK_TFLOPS.items() if of in name), None)
    if peak is None or not seconds:
        return {}
    return {"perf/mfu": 6 * parameters * tokens / (seconds * gpus * peak * 1e12)}
