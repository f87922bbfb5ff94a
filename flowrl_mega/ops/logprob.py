"""Log-probs of given tokens straight from hidden states, over a tensor-parallel vocabulary.

Only the rows handed in are multiplied with the head, logits are made a chunk of rows at a time, and the
tensor-parallel combination is ONE all-gather of four numbers a row, combined in a fixed rank order, so that every
rank holds the same bits.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_BYTES = 16 << 20  # logits of one chunk: small enough to stay near the cache, large enough for a full-speed GEMM


class HeadOutput(NamedTuple):
    logp: Tensor  # [R] fp32, with gradient
    entropy: Tensor  # [R] fp32, without


class Shard(NamedTuple):
    """This rank's columns of the vocabulary: `start` is the first id, `valid` how many of them are not padding."""

    start: int
    valid: int


def lm_head_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    temperature: float = 1.0,
    shard: Shard | None = None,
    group: dist.ProcessGroup | None = None,
    logits_budget_bytes: int = 256 << 20,
) -> HeadOutput:
    """log softmax(hidden @ weight.T / temperature)[target] and its entropy, in nats.

    hidden [R, H] (the same on all ranks of `group`), weight [V', H] (this rank's rows of the vocabulary),
    target [R] int64 ids. The backward pass keeps logits up to `logits_budget_bytes` and recomputes the rest;
    the gradient of `hidden` comes back summed over `group`.
    """
    shard = shard or Shard(0, weight.shape[0])
    assert hidden.shape[0] == target.shape[0], (hidden.shape, target.shape)
    budget = logits_budget_bytes if torch.is_grad_enabled() else 0  # forward cannot ask: autograd is off inside it
    return HeadOutput(*_LmHeadLogProb.apply(hidden, weight, target, 1.0 / temperature, shard, group, budget))


class _LmHeadLogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        inv_temperature: float,
        shard: Shard,
        group: dist.ProcessGroup | None,
        budget: int,
    ) -> tuple[Tensor, Tensor]:
        weight_t = weight[: shard.valid].t()
        chunk = max(1, _CHUNK_BYTES // (4 * max(1, shard.valid)))
        stats = hidden.new_empty(4, hidden.shape[0], dtype=torch.float32)
        kept: list[Tensor | None] = []
        for rows in _chunks(hidden.shape[0], chunk):
            logits = _logits(hidden[rows], weight_t)
            stats[:, rows] = _stats(logits, target[rows] - shard.start, inv_temperature)
            budget -= logits.numel() * 4
            kept.append(logits if budget >= 0 else None)
        maximum, total, weighted, picked = _combine(stats, inv_temperature, group)
        log_total = total.log()
        logp = (picked - maximum) * inv_temperature - log_total
        entropy = log_total - weighted / total
        ctx.save_for_backward(hidden, weight, target, maximum, log_total)
        ctx.rest = (inv_temperature, shard, group, chunk, kept)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, maximum, log_total = ctx.saved_tensors
        inv_temperature, shard, group, chunk, kept = ctx.rest
        valid = weight[: shard.valid]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = torch.zeros_like(weight, dtype=torch.float32)
        # A rank that holds nothing but padding has no part in the gradient.
        for place, rows in enumerate(_chunks(hidden.shape[0], chunk) if shard.valid else []):
            logits, kept[place] = kept[place], None
            if logits is None:
                logits = _logits(hidden[rows], valid.t())
            scale = grads[0][rows] * inv_temperature
            local = target[rows] - shard.start
            # d logp / d logit = (onehot - p) / temperature, in place of the logits.
            d_logits = logits.sub_(maximum[rows, None]).mul_(inv_temperature).sub_(log_total[rows, None]).exp_()
            d_logits.mul_(-scale[:, None])
            mine = (local >= 0) & (local < shard.valid)
            d_logits.scatter_add_(1, local.clamp(0, shard.valid - 1)[:, None], (scale * mine)[:, None])
            d_logits = d_logits.to(weight.dtype)
            d_hidden[rows] = d_logits @ valid
            d_weight[: shard.valid] += d_logits.t() @ hidden[rows].to(weight.dtype)
        if group is not None and group.size() > 1:
            dist.all_reduce(d_hidden, group=group)
        return d_hidden.to(hidden.dtype), d_weight.to(weight.dtype), None, None, None, None, None


def _chunks(rows: int, size: int) -> list[slice]:
    return [slice(start, min(start + size, rows)) for start in range(0, rows, size)]


def _logits(hidden: Tensor, weight_t: Tensor) -> Tensor:
    """[r, V'] in fp32: a bf16 logit of 16 to 32 has a step of 0.125, far too coarse for sums over a long answer."""
    if hidden.dtype == torch.float32:
        return hidden @ weight_t
    if hidden.is_cuda:
        return torch.mm(hidden, weight_t, out_dtype=torch.float32)
    return hidden.float() @ weight_t.float()


def _stats(logits: Tensor, local_target: Tensor, inv_temperature: float) -> Tensor:
    """[4, r]: row maximum m, S = sum e^d, E = sum d e^d with d = (x - m) / temperature, and the target's logit.

    The raw maximum is taken off before the scaling, which keeps the gradient exact at temperatures far from 1.
    """
    rows, width = logits.shape
    if width == 0:
        nothing = logits.new_zeros(rows)
        return torch.stack([nothing - torch.inf, nothing, nothing, nothing])
    maximum = logits.amax(1)
    d = (logits - maximum[:, None]).mul_(inv_temperature)
    e = d.exp()
    mine = (local_target >= 0) & (local_target < width)
    picked = logits.gather(1, local_target.clamp(0, width - 1)[:, None])[:, 0]
    return torch.stack([maximum, e.sum(1), (d * e).sum(1), torch.where(mine, picked, 0.0)])


def _combine(stats: Tensor, inv_temperature: float, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics of the whole vocabulary, [4, R], bitwise the same on every rank of the group."""
    if group is None or group.size() == 1:
        return stats
    parts = [torch.empty_like(stats) for _ in range(group.size())]
    dist.all_gather(parts, stats, group=group)
    maximum = torch.stack([part[0] for part in parts]).amax(0)
    total, weighted, picked = (torch.zeros_like(maximum) for _ in range(3))
    for part_max, part_total, part_weighted, part_picked in parts:
        delta = (part_max - maximum) * inv_temperature
        factor = delta.exp()  # exactly 0 for a shard that is all padding (its maximum is -inf)
        shift = torch.where(factor > 0, delta, 0.0)
        total += factor * part_total
        weighted += factor * (part_weighted + shift * part_total)
        picked += part_picked
    return torch.stack([maximum, total, weighted, picked])
