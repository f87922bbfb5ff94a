"""Log-probs, entropy and per-sequence sums from logits that exist already, with autograd."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl_mega.ops import checks
from flowrl_mega.ops.kernels import Kernels, Name, kernels_for


class LogProb(NamedTuple):
    """Log-probs and entropies of T rows, [T] or [B, S] like the targets, and their sums over B sequences."""

    logp: Tensor
    entropy: Tensor  # in nats
    sequence: Tensor  # [B, 3] float64: sum of logp, number of rows, sum of entropy
    lse: Tensor  # log sum exp(logits / temperature)


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
    """log softmax(logits / temperature)[target], the entropy, their sums over each sequence, and the log of the
    softmax's sum; all with gradient.

    logits [T, V] fp32, bf16, fp16 (or float64) with any row stride; target [T] int64 or int32 ids below `vocab_valid`
    (V), or `ignore_index`: such a row is not read and gives 0. cu_seqlens [B + 1] int64 or int32 offsets into the T
    rows; None: all are one sequence. temperature: one number, or [T].
    Or logits [B, S, V], also a view such as `logits[:, :-1]`, with target and temperature [B, S]: T = B S rows, and
    without cu_seqlens B sequences. Nothing is copied.

    With `inplace_backward` the gradient is written over the logits, so the whole needs no second matrix of their size;
    they must not be read after that, and a second backward raises. ValueError says what is wrong with the input.
    Under torch.compile the gradient never lies over the logits.
    """
    checks.logits(logits)
    rows, columns = logits.shape[:-1], logits.shape[-1]
    valid = columns if vocab_valid is None else checks.vocab_valid(vocab_valid, columns)
    target = checks.target(target, rows, valid, logits.device, ignore_index)
    cu_seqlens = checks.cu_seqlens(cu_seqlens, rows, logits.device)
    inv_temperature = checks.inv_temperature(temperature, rows, logits)
    inputs = (logits, target, cu_seqlens, inv_temperature, valid, ignore_index)
    if torch.compiler.is_compiling():
        logp, entropy, sequence, lse, *_ = torch.ops.flowrl.whole_logprob(*inputs, backend)
    else:
        chosen = kernels_for(backend, logits.device)
        logp, entropy, sequence, lse = _LogProb.apply(*inputs, inplace_backward, chosen)
    return LogProb(logp.view(rows), entropy.view(rows), sequence, lse.view(rows))


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
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        parts = [
            k.logprob_stats(x, target[rows], rows_of(inv_temperature, rows), 0, valid, ignore_index, True)
            for x, rows in _matrices(logits)
        ]
        stats = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        logp, entropy, maximum, log_sum, sequence = k.segment_reduce(
            stats[None], target, inv_temperature, cu_seqlens, ignore_index
        )
        # Kept past save_for_backward, which would refuse logits that a backward has overwritten without saying why.
        ctx.logits, ctx.version = logits, None if logits.is_inference() else logits._version
        ctx.save_for_backward(target, maximum, log_sum, inv_temperature, cu_seqlens, entropy)
        ctx.rest = (valid, ignore_index, inplace, k)
        ctx.set_materialize_grads(False)
        return logp, entropy, sequence, torch.addcmul(log_sum, maximum, inv_temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        if ctx.logits is None or ctx.logits._version != ctx.version:
            raise RuntimeError(
                "logprob: the logits have been overwritten, perhaps by a first backward; for a second one use "
                "inplace_backward=False"
            )
        target, maximum, log_sum, inv_temperature, cu_seqlens, entropy = ctx.saved_tensors
        valid, ignore_index, inplace, k = ctx.rest
        logits = ctx.logits
        grad = row_gradient(grads, entropy, cu_seqlens)
        of_rows = (target, grad.logp, maximum, log_sum, inv_temperature)
        matrices = [
            ((x, *(rows_of(value, rows) for value in of_rows), 0, valid, ignore_index), grad.sloped(rows))
            for x, rows in _matrices(logits)
        ]
        if inplace:
            ctx.logits = None
            for arguments, sloped in matrices:
                k.logprob_backward_(*arguments, *sloped)
            torch.autograd.graph.increment_version(logits)  # whoever else has saved them for a backward hears of it
            d_logits = logits.detach()
        else:
            parts = [k.logprob_backward(*arguments, logits.dtype, *sloped) for arguments, sloped in matrices]
            d_logits = (torch.cat(parts) if len(parts) > 1 else parts[0]).view(logits.shape)
        return d_logits, *[None] * 7


def _matrices(logits: Tensor) -> list[tuple[Tensor, slice]]:
    """Views [T', V], and which of the T rows each holds: all, or of [B, S, V] one for each of B where the B are not as
    far from one another as S rows are long."""
    if logits.dim() == 2:
        return [(logits, slice(0, logits.shape[0]))]
    batch, rows, columns = logits.shape
    if batch <= 1 or rows <= 1 or logits.stride(0) == rows * logits.stride(1):
        return [(logits.view(batch * rows, columns), slice(0, batch * rows))]
    return [(x, slice(i * rows, (i + 1) * rows)) for i, x in enumerate(logits.unbind())]


def rows_of(value: Tensor, rows: slice) -> Tensor:
    """Some rows' part of a number a row; one number for all rows stays one."""
    return value[rows] if value.numel() > 1 else value


class RowGradient(NamedTuple):
    """What the backward op takes of each row, [T] each."""

    logp: Tensor
    offset: Tensor | None
    slope: Tensor | None

    def sloped(self, rows: slice) -> tuple[Tensor, Tensor] | tuple[()]:
        """Some rows' last arguments of the backward op; none where log-probs alone have a gradient."""
        return () if self.offset is None or self.slope is None else (self.offset[rows], self.slope[rows])


def row_gradient(grads: Sequence[Tensor | None], entropy: Tensor, cu_seqlens: Tensor) -> RowGradient:
    """From the gradients of logp and entropy [T], of the sequences' sums [B, 3], and of the log of the sum [T]."""
    d_logp, d_entropy, d_sequence, d_lse = grads
    zero = torch.zeros_like(entropy)
    d_logp = zero if d_logp is None else d_logp.to(entropy.dtype).contiguous()
    if d_sequence is not None:
        each = d_sequence.to(entropy.dtype).repeat_interleave(cu_seqlens.diff(), 0, output_size=entropy.numel())
        d_logp = d_logp + each[:, 0]
        if d_sequence.is_cuda or bool(d_sequence[:, 2].any()):  # a GPU is not waited for
            d_entropy = each[:, 2] if d_entropy is None else d_entropy + each[:, 2]
    if d_entropy is None and d_lse is None:
        return RowGradient(d_logp, None, None)
    slope = zero if d_entropy is None else d_entropy.to(entropy.dtype).contiguous()
    offset = torch.where(slope == 0, zero, slope * entropy)  # a NaN of a row without gradient is nobody's
    return RowGradient(d_logp, offset if d_lse is None else offset - d_lse.to(entropy.dtype), slope)
