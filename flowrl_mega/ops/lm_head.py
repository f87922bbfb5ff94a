"""Log-probs of given tokens straight from hidden states, over a tensor-parallel vocabulary.

Logits are made a chunk of the vocabulary at a time (a chunk of rows would read and write all of the weight's gradient
again), and without gradient nothing of the size rows x vocabulary ever exists. The tensor-parallel combination is ONE
all-gather of four numbers a row, combined in rank order, so that every rank holds the same bits.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl_mega.ops import checks
from flowrl_mega.ops.kernels import Kernels, Name, kernels_for
from flowrl_mega.ops.liger import liger_logprob
from flowrl_mega.ops.logprob import row_gradient
from flowrl_mega.ops.torch_ops import combine, stats_dtype

IGNORE = -100
# Logits of one chunk. CPU: near the cache, yet a GEMM at full speed. CUDA: enough work for every multiprocessor.
_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
_NARROWEST = 256  # columns of a chunk, however many rows there are: narrower GEMMs waste the machine


class Shard(NamedTuple):
    """This rank's columns of the vocabulary: the first id, how many are not padding, and how many ids there are."""

    start: int
    valid: int
    vocab: int


class HeadOutput(NamedTuple):
    """Log-probs and entropies of R rows, and their sums over B sequences."""

    logp: Tensor  # [R] fp32, with gradient
    entropy: Tensor  # [R] fp32, in nats, without
    sequence: Tensor  # [B, 3] float64: sum of logp (with gradient), number of rows, sum of entropy


def lm_head_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float = 1.0,
    shard: Shard | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_gradient: bool = True,
    logits_budget_bytes: int = 256 << 20,
    backend: Name | Literal["liger"] = "auto",
) -> HeadOutput:
    """log softmax(hidden @ weight.T / temperature)[target] and its entropy, by row and summed over each sequence.

    hidden [T, H] (the same on all ranks of `group`), weight [V', H] (this rank's rows of the vocabulary). rows [R]
    int64 selects the response rows before anything is multiplied; None: all T. target [R] int64 ids; -100 gives 0 (its
    hidden row must be finite: leave rows out by `rows`).
    cu_seqlens [B + 1] offsets into the R rows; None: one sequence.

    The backward pass keeps logits up to `logits_budget_bytes` and makes the rest again. The weight's gradient is added
    to `weight.main_grad` where Megatron has one. The gradient of `hidden` comes back summed over `group`; under
    sequence parallelism the caller's gather reduce-scatters it instead (`reduce_gradient=False`).
    """
    shard = shard or Shard(0, weight.shape[0], weight.shape[0])
    checks.head(hidden, weight, rows, shard.valid)
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    target = checks.target(target, hidden.shape[0], shard.vocab, hidden.device, IGNORE)
    cu_seqlens = checks.cu_seqlens(cu_seqlens, hidden.shape[0], hidden.device)
    group = group if group is not None and group.size() > 1 else None
    if backend == "liger":
        rest = (temperature, shard.valid, shard.vocab, IGNORE, group, reduce_gradient)
        return HeadOutput(*liger_logprob(hidden, weight, target, cu_seqlens, *rest))
    has_backward = torch.is_grad_enabled() and (hidden.requires_grad or weight.requires_grad)  # forward cannot ask
    call = _Call(
        shard=shard,
        group=group,
        reduce_gradient=reduce_gradient,
        budget=logits_budget_bytes if has_backward else 0,
        kernels=kernels_for(backend, hidden.device),
    )
    inv_temperature = checks.inv_temperature(temperature, hidden.shape[0], hidden)
    return HeadOutput(*_LmHead.apply(hidden, weight, target, cu_seqlens, inv_temperature, call))


class _Call(NamedTuple):
    """Arguments that forward and backward share."""

    shard: Shard
    group: dist.ProcessGroup | None
    reduce_gradient: bool
    budget: int
    kernels: Kernels

    def chunks(self, hidden: Tensor) -> list[slice]:
        """This shard's columns, a chunk of logits each. A shard that is all padding still has a (void) chunk."""
        bytes_ = _CHUNK_BYTES[hidden.device.type]
        width = max(_NARROWEST, bytes_ // (4 * max(1, hidden.shape[0])))
        valid = self.shard.valid
        return [slice(first, min(first + width, valid)) for first in range(0, valid, width)] or [slice(0, 0)]

    def vocab_range(self, columns: slice) -> tuple[int, int, int]:
        """vocab_start, vocab_valid and ignore_index of a chunk."""
        return self.shard.start + columns.start, columns.stop - columns.start, IGNORE


class _LmHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        target: Tensor,
        cu_seqlens: Tensor,
        inv_temperature: Tensor,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor]:
        k, budget = call.kernels, call.budget
        parts, kept = [], []
        for columns in call.chunks(hidden):
            logits = _logits(hidden, weight[columns])
            parts.append(k.logprob_stats(logits, target, inv_temperature, *call.vocab_range(columns), True))
            budget -= logits.numel() * logits.element_size()
            kept.append(logits if budget >= 0 else None)
            del logits  # one chunk that is not kept, not two
        stats = combine(torch.stack(parts), inv_temperature).to(parts[0].dtype) if len(parts) > 1 else parts[0]
        shards = _gather(stats, call.group)
        logp, entropy, maximum, log_sum, sequence = k.segment_reduce(
            shards, target, inv_temperature, cu_seqlens, IGNORE
        )
        ctx.save_for_backward(hidden, weight, target, cu_seqlens, inv_temperature, maximum, log_sum)
        ctx.call, ctx.kept, ctx.main_grad = call, kept, getattr(weight, "main_grad", None)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy, sequence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, target, cu_seqlens, inv_temperature, maximum, log_sum = ctx.saved_tensors
        call, kept = ctx.call, ctx.kept
        grad = row_gradient(grads[0], grads[2], cu_seqlens)
        rows = (target, grad, maximum, log_sum, inv_temperature)
        d_hidden = d_weight = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.zeros_like(hidden, dtype=stats_dtype(hidden.dtype))
        if ctx.needs_input_grad[1]:
            d_weight = ctx.main_grad
            if d_weight is None:
                d_weight = torch.zeros_like(weight, dtype=stats_dtype(weight.dtype))
        for i, columns in enumerate(call.chunks(hidden)):
            logits, kept[i] = kept[i], None  # overwritten below; a second backward makes it again
            if logits is None:
                logits = _logits(hidden, weight[columns])
            d_logits = _d_logits(call.kernels, logits, rows, call.vocab_range(columns), weight)
            del logits
            if d_hidden is not None:
                _add_product(d_hidden, d_logits, weight[columns])
            if d_weight is not None:
                _add_product(d_weight[columns], d_logits.t(), hidden)
        if d_hidden is not None:
            if call.group is not None and call.reduce_gradient:
                dist.all_reduce(d_hidden, group=call.group)
            d_hidden = d_hidden.to(hidden.dtype)
        # Megatron's hook adds a weight's `grad` to its main_grad; what is there already must not come again.
        if d_weight is not None:
            d_weight = None if ctx.main_grad is not None else d_weight.to(weight.dtype)
        return d_hidden, d_weight, None, None, None, None


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, width] in fp32: a bf16 logit of 16 to 32 has a step of 0.125, far too coarse for sums over a long answer."""
    if hidden.dtype in (torch.float32, torch.float64):
        return hidden @ weight.t()
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=torch.float32)
    return hidden.float() @ weight.t().float()


def _d_logits(
    k: Kernels, logits: Tensor, rows: tuple[Tensor, ...], vocab_range: tuple[int, int, int], weight: Tensor
) -> Any:
    """The gradient of the logits: in their place, or on a GPU in the type of its fast GEMM."""
    if weight.is_cuda and weight.dtype != logits.dtype:
        return k.logprob_backward(logits, *rows, *vocab_range, weight.dtype)
    k.logprob_backward_(logits, *rows, *vocab_range)
    return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b, accumulated in the type of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b.to(a.dtype))
    elif a.is_cuda and total.dtype == torch.float32:
        total.add_(torch.mm(a, b, out_dtype=torch.float32))
    else:
        total.add_(a @ b.to(a.dtype))


def _gather(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics of all shards in rank order, [W, 4, R]."""
    if group is None:
        return stats[None]
    shards = stats.new_empty(group.size(), *stats.shape)
    dist.all_gather_into_tensor(shards.flatten(0, 1), stats, group=group)
    return shards
