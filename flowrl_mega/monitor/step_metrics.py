"""From what micro-batches and updates report to one line of metrics.jsonl."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import psutil
import torch
import torch.distributed as dist
from torch import Tensor


def reduce_reports(reports: Sequence[Mapping[str, Tensor]], group: dist.ProcessGroup) -> dict[str, float]:
    """Means over all sequences of an update, the same on every rank of the data-parallel group.

    A report holds, for one micro-batch, a vector a metric and its number of sequences under "count"; each metric is
    summed and divided by the number of sequences ("max_..." metrics: their maximum). "loss" is divided by "loss_count",
    which may count tokens. Of moments one figure is made: of "is_weight" and its square "effective_sample_size", of the
    critic's "return" and "value_error" and their squares "explained_variance".
    """
    names = sorted(reports[0])
    sums = torch.stack([torch.cat([r[name] for r in reports]).double().sum() for name in names])
    largest = torch.stack([torch.cat([r[name] for r in reports]).double().max() for name in names])
    if group.size() > 1:
        dist.all_reduce(sums, group=group)
        dist.all_reduce(largest, op=dist.ReduceOp.MAX, group=group)
    count = float(sums[names.index("count")])
    pairs = zip(names, sums.tolist(), largest.tolist(), strict=True)
    metrics = {n: top if n.startswith("max_") else total / count for n, total, top in pairs if n != "count"}
    if "loss_count" in metrics:
        metrics["loss"] /= metrics.pop("loss_count")
    if "is_weight" in metrics:
        mean, mean_square = metrics.pop("is_weight"), metrics.pop("is_weight_sq")
        metrics["effective_sample_size"] = effective_sample_size(mean, mean_square)
    if "value_error" in metrics:
        error, error_square = metrics.pop("value_error"), metrics.pop("value_error_sq")
        variance = metrics.pop("return_sq") - metrics["return"] ** 2
        metrics["explained_variance"] = explained_variance(variance, error_square - error**2)
    return metrics


def explained_variance(of_returns: float, of_errors: float) -> float:
    """How much of the returns' variance the critic knows: 1 all, 0 no more than their mean, below 0 less than that."""
    return 1 - of_errors / of_returns if of_returns > 1e-12 else 0.0


def effective_sample_size(mean: float, mean_square: float) -> float:
    """Of sequences with importance weights of this mean and mean square, the share, in (0, 1], that equal weights would
    need for estimates as certain: 1 where all weigh the same, 1/n where one of n outweighs the others. (Kish, 1965.)

    It needs the sums over all sequences: the mean of the micro-batches' own sizes is nearer to 1.
    """
    return mean * mean / mean_square


def merge_updates(updates: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """One value of a step's updates: their mean; of counters and maxima the largest."""
    names = dict.fromkeys(name for update in updates for name in update)
    merged = {}
    for name in names:
        values = [update[name] for update in updates if name in update]
        largest = name.startswith("max_") or name == "skipped_updates"
        merged[name] = max(values) if largest else sum(values) / len(values)
    return merged


def cost_metrics(seconds: Mapping[str, float], tokens: int, generated: int) -> dict[str, float]:
    """What a step took: the only metrics that differ between two runs of the same settings.

    `tokens`: prompt and response tokens trained on; `generated`: response tokens. Memory is this rank's, in GB.
    """
    total = sum(seconds.values())
    on_gpu = torch.cuda.is_available()
    memory = torch.cuda.max_memory_allocated() if on_gpu else psutil.Process().memory_info().rss
    return {
        **{f"seconds/{phase}": value for phase, value in seconds.items()},
        "seconds/step": total,
        "tokens_per_second": tokens / total,
        "generated_tokens_per_second": generated / seconds["generate"],
        "memory_gb": memory / 1e9,
    }
