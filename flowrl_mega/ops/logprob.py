"""Log-probs, entropy and per-sequence sums from logits that exist already, with autograd."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl_mega.ops import checks
from flowrl_mega.ops.kernels import Kernels, Name, kernels_for
from flowrl_mega.ops.torch_ops import stats_dtype


class LogProb(NamedTuple):
    """Log-probs and entropies of T rows, and their sums over B sequences."""

    logp: Tensor  # [T], with gradient
    entropy: Tensor  # [T], in nats, without
    sequence: Tensor  # [B, 3] float64: sum of logp (with gradient), number of rows, sum of entropy


def logprob(
    logits: Tensor,
    target: Tensor,
    cu_seqlens: Tensor | None = None,
    *,
    temperature: float | Tensor = 1.0,
    vocab_valid: int | None = None,
    ignore_index: int = -100,
    inplace_backward: bool = True,
    backend: Name = "auto",
) -> LogProb:
    """log softmax(logits / temperature)[target], the entropy, and their sums over each sequence.

    logits [T, V] fp32, bf16, fp16 (or float64) with any row stride; target [T] int64 ids below `vocab_valid` (V), or
    `ignore_index`: such a row is not read and gives 0. cu_seqlens [B + 1] int64 offsets into the T rows; None: all are
    one sequence. temperature: one number, or [T].

    With `inplace_backward` the gradient is written over the logits, so the whole needs no second matrix of their size;
    they must not be read after that, and a second backward raises. ValueError says what is wrong with the input.
    """
    checks.logits(logits)
    rows, columns = logits.shape
    valid = columns if vocab_valid is None else checks.vocab_valid(vocab_valid, columns)
    target = checks.target(target, rows, valid, logits.device, ignore_index)
    cu_seqlens = checks.cu_seqlens(cu_seqlens, rows, logits.device)
    inv_temperature = checks.inv_temperature(temperature, rows, logits)
    chosen = kernels_for(backend, logits.device)
    return LogProb(
        *_LogProb.apply(logits, target, cu_seqlens, inv_temperature, valid, ignore_index, inplace_backward, chosen)
    )


class _LogProb(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        logits: Tensor,
        target: Tensor,
        cu_seqlens: Tensor,
        inv_temperature: Tensor,
        valid: int,
        ignore_index: int,
        inplace: bool,
        k: Kernels,
    ) -> tuple[Tensor, Tensor, Tensor]:
        stats = k.logprob_stats(logits, target, inv_temperature, 0, valid, ignore_index, True)
        logp, entropy, maximum, log_sum, sequence = k.segment_reduce(
            stats[None], target, inv_temperature, cu_seqlens, ignore_index
        )
        # Kept past save_for_backward, which would refuse logits that a backward has overwritten without saying why.
        ctx.logits, ctx.version = logits, None if logits.is_inference() else logits._version
        ctx.save_for_backward(target, maximum, log_sum, inv_temperature, cu_seqlens)
        ctx.rest = (valid, ignore_index, inplace, k)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy, sequence

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.logits is None or ctx.logits._version != ctx.version:
            raise RuntimeError(
                "logprob: the logits have been overwritten, perhaps by a first backward; for a second one use "
                "inplace_backward=False"
            )
        target, maximum, log_sum, inv_temperature, cu_seqlens = ctx.saved_tensors
        valid, ignore_index, inplace, k = ctx.rest
        logits = ctx.logits
        grad = row_gradient(grads[0], grads[2], cu_seqlens).to(stats_dtype(logits.dtype))
        arguments = (logits, target, grad, maximum, log_sum, inv_temperature, 0, valid, ignore_index)
        if inplace:
            ctx.logits = None
            k.logprob_backward_(*arguments)
            torch.autograd.graph.increment_version(logits)  # whoever else has saved them for a backward hears of it
            d_logits = logits.detach()
        else:
            d_logits = k.logprob_backward(*arguments, logits.dtype)
        return d_logits, *[None] * 7


def row_gradient(d_logp: Tensor, d_sequence: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Gradient of each row's logp [T] from those of logp itself and of the sequences' sums [B, 3]."""
    lengths = cu_seqlens.diff()
    return d_logp + d_sequence[:, 0].repeat_interleave(lengths, output_size=d_logp.numel()).to(d_logp.dtype)
