"""The ops of csrc in plain torch: what runs where nothing could be built, and the reading of what each op computes.

Statistics are float32, or float64 for float64 logits. A row whose target is `ignore_index` is not looked at: it may
hold NaN. Columns from `vocab_valid` on are padding. d = (x - m) / temperature: the raw maximum is taken off before the
scaling, which keeps the gradient exact at temperatures far from 1.
"""

from __future__ import annotations

import torch
from torch import Tensor


def stats_dtype(logits: torch.dtype) -> torch.dtype:
    return torch.float64 if logits == torch.float64 else torch.float32


def logprob_stats(
    logits: Tensor,
    target: Tensor,
    inv_temperature: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
    entropy: bool,
) -> Tensor:
    """[4, T] of a shard's logits [T, V']: maximum m, S = sum e^d, E = sum d e^d, and the target's logit X where this
    shard owns it (ids vocab_start .. vocab_start + vocab_valid - 1), else 0. Nothing to see is (-inf, 0, 0, 0).

    target [T] int64; inv_temperature [1] or [T].
    """
    stats = logits.new_zeros(4, logits.shape[0], dtype=stats_dtype(logits.dtype))
    stats[0] = -torch.inf
    if vocab_valid == 0:
        return stats
    read = target != ignore_index
    x = logits[:, :vocab_valid].to(stats.dtype).masked_fill(~read[:, None], -torch.inf)
    maximum = x.amax(1)
    base = maximum.masked_fill(maximum == -torch.inf, 0.0)  # -inf - -inf would be NaN
    d = (x - base[:, None]).mul_(inv_temperature[:, None])
    e = d.exp()
    stats[0], stats[1] = maximum, e.sum(1)
    if entropy:
        stats[2] = torch.where(e == 0, 0.0, d * e).sum(1)  # a logit of -inf has d e^d = 0
    local = target - vocab_start
    mine = read & (local >= 0) & (local < vocab_valid)
    picked = x.gather(1, local.clamp(0, vocab_valid - 1)[:, None])[:, 0]
    stats[3] = torch.where(mine, picked, 0.0)
    return stats


def combine(stats: Tensor, inv_temperature: Tensor) -> Tensor:
    """Statistics [W, 4, T] of W parts of the vocabulary, combined in the order given: [4, T] float64."""
    parts = stats.double()
    maximum = parts[:, 0].amax(0)
    total, weighted, picked = (torch.zeros_like(maximum) for _ in range(3))
    for m, s, e, x in parts:
        shift = (m - maximum) * inv_temperature
        factor = torch.where(m == -torch.inf, 0.0, shift.exp())  # a part that is all padding weighs exactly nothing
        total += torch.where((factor == 0) & ~s.isnan(), 0.0, factor * s)
        weighted += torch.where(factor == 0, 0.0, factor * (e + shift * s))
        picked += x
    return torch.stack([maximum, total, weighted, picked])


def segment_reduce(
    stats: Tensor, target: Tensor, inv_temperature: Tensor, cu_seqlens: Tensor, ignore_index: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Shards' statistics [W, 4, T], combined in rank order, to logp, entropy, m and log S, all [T], and per sequence of
    cu_seqlens [B + 1] the sums [B, 3] float64 of logp, of rows that are not ignored, and of entropy.

    Ignored rows are 0 in all of them.
    """
    maximum, total, weighted, picked = combine(stats, inv_temperature)
    log_sum = total.log()
    logp = (picked - maximum) * inv_temperature - log_sum
    entropy = log_sum - weighted / total
    read = target != ignore_index
    logp, entropy, maximum, log_sum = (
        torch.where(read, value, 0.0).to(stats.dtype) for value in (logp, entropy, maximum, log_sum)
    )
    count = cu_seqlens.numel() - 1
    rows = torch.arange(target.numel(), device=target.device)
    segment = torch.searchsorted(cu_seqlens, rows, right=True) - 1
    parts = torch.stack([logp.double(), read.double(), entropy.double()], 1)
    sums = parts.new_zeros(count + 1, 3).index_add_(0, segment, parts)[:count]  # rows after the last go nowhere
    return logp, entropy, maximum, log_sum, sums


def logprob_backward(
    logits: Tensor,
    target: Tensor,
    grad: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    inv_temperature: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
    dtype: torch.dtype,
    offset: Tensor | None = None,
    slope: Tensor | None = None,
) -> Tensor:
    """(grad (onehot - p) - p (offset + slope log p)) / temperature [T, V'] from the logits, with
    log p = (x - m) / temperature - log S.

    grad, offset and slope [T]: of the loss with respect to log-prob g, entropy h and log of the sum l they are g,
    h * entropy - l, and h. None: 0. The result is 0 in padded columns and in rows that are ignored or have no gradient,
    whatever they hold.
    """
    sloped = offset is not None and slope is not None
    read = (target != ignore_index) & ((grad != 0) | ((offset != 0) | (slope != 0) if sloped else False))
    scale = torch.where(read, grad * inv_temperature, 0.0)
    logp = logits[:, :vocab_valid].to(grad.dtype).sub(maximum[:, None])
    logp = logp.mul_(inv_temperature[:, None]).sub_(log_sum[:, None])
    local = target - vocab_start
    mine = read & (local >= 0) & (local < vocab_valid)
    out = torch.zeros(logits.shape, dtype=dtype, device=logits.device)
    if vocab_valid:
        column = local.clamp(0, vocab_valid - 1)[:, None]
        own = -torch.expm1(logp.gather(1, column))  # 1 - p without cancellation
        rest = None if offset is None or slope is None else _sloped(logp, offset, slope)
        p = logp.exp_().neg_()
        p.scatter_(1, column, torch.where(mine[:, None], own, p.gather(1, column)))
        p.mul_(scale[:, None])
        if rest is not None:
            p.addcmul_(rest, inv_temperature[:, None], value=-1)
        out[:, :vocab_valid] = p.masked_fill_(~read[:, None], 0.0)
    return out


def _sloped(logp: Tensor, offset: Tensor, slope: Tensor) -> Tensor:
    """p (offset + slope log p), 0 where p is."""
    p = logp.exp()
    return torch.where(p == 0, 0.0, p * (offset[:, None] + slope[:, None] * logp))


def logprob_backward_(
    logits: Tensor,
    target: Tensor,
    grad: Tensor,
    maximum: Tensor,
    log_sum: Tensor,
    inv_temperature: Tensor,
    vocab_start: int,
    vocab_valid: int,
    ignore_index: int,
    offset: Tensor | None = None,
    slope: Tensor | None = None,
) -> None:
    """`logprob_backward` in place of the logits."""
    rows = (target, grad, maximum, log_sum, inv_temperature, vocab_start, vocab_valid, ignore_index)
    logits.copy_(logprob_backward(logits, *rows, logits.dtype, offset, slope))
