"""Log-probs of given tokens straight from hidden states, over a tensor-parallel vocabulary.

Logits are made a chunk of the vocabulary at a time, and without gradient nothing of the size rows x vocabulary ever
exists. Statistics are those of tiles, the same columns however many rows there are, so that a row's do not depend on
the others: a chunk is one tile or several, and where one is too much, its rows come in blocks. The tensor-parallel
combination is ONE all-gather of four numbers a row and tile, combined in the order of the vocabulary: every rank holds
the same bits.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import Any, Literal, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor
from torch.autograd.function import once_differentiable

from flowrl_mega.ops import checks
from flowrl_mega.ops.kernels import Kernels, Name, check_ranks, kernels_for
from flowrl_mega.ops.liger import liger_logprob
from flowrl_mega.ops.logprob import row_gradient, rows_of
from flowrl_mega.ops.torch_ops import stats_dtype

IGNORE = -100
# Columns of a tile, and logits of a chunk. CPU: near the cache, yet a GEMM at full speed. CUDA: enough work for every
# multiprocessor; each further block of rows reads and writes all of the weight's gradient again, in a twentieth of the
# time of its GEMMs.
_TILE = {"cpu": 2048, "cuda": 8192}
_CHUNK_BYTES = {"cpu": 16 << 20, "cuda": 256 << 20}
_MOST_TILES = 32  # of a chunk
_ALIGNED = 8  # columns: 16 bytes of bf16, below which GEMMs leave their fast kernels


class Shard(NamedTuple):
    """This rank's columns of the vocabulary: the first id, how many are not padding, and how many ids there are."""

    start: int
    valid: int
    vocab: int


class HeadOutput(NamedTuple):
    """Log-probs and entropies of R rows, [R] or [B, S] like the targets, and their sums over B sequences."""

    logp: Tensor  # fp32
    entropy: Tensor  # fp32, in nats; with backend "liger" without gradient
    sequence: Tensor  # [B, 3] float64: sum of logp, number of rows, sum of entropy
    lse: Tensor | None  # fp32, log sum exp(logits / temperature); None with backend "liger"


def lm_head_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    *,
    rows: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    shard: Shard | None = None,
    group: dist.ProcessGroup | None = None,
    reduce_gradient: bool = True,
    logits_budget_bytes: int = 256 << 20,
    backend: Name | Literal["liger"] = "auto",
) -> HeadOutput:
    """log softmax(hidden @ weight.T / temperature)[target] and its entropy, by row and summed over each sequence, and
    the log of the softmax's sum; all with gradient.

    hidden [T, H] (the same on all ranks of `group`), weight [V', H] (this rank's rows of the vocabulary; V' too is the
    same on all ranks). Of two types the wider multiplies, and each gets its gradient in its own. rows [R] int64 selects
    the response rows before anything is multiplied; None: all T. target [R] int64 or int32 ids; -100 gives 0 (its
    hidden row must be finite: leave rows out by `rows`). temperature: one number, or [R].
    cu_seqlens [B + 1] offsets into the R rows; None: one sequence.
    bias [V'], logit_scale and softcap change the logits before the temperature does, in this order: plus bias, times
    logit_scale (Cohere, Granite), softcap * tanh(. / softcap) (Gemma).
    Or hidden [B, S, H] with target and temperature [B, S]: R = B S rows, and without cu_seqlens B sequences.

    The backward pass keeps logits up to `logits_budget_bytes`, or all of them where only one chunk is beyond, and makes
    the rest again. The weight's gradient is added to `weight.main_grad` where Megatron has one. The gradient of
    `hidden` comes back summed over `group`; under sequence parallelism the caller's gather reduce-scatters it instead
    (`reduce_gradient=False`). Under torch.compile there is no group and no main_grad, and all logits are made again.
    """
    shard = shard or Shard(0, weight.shape[0], weight.shape[0])
    checks.head(hidden, weight, rows, shard.valid)
    checks.head_options(weight, bias, logit_scale, softcap)
    shape = hidden.shape[:-1] if rows is None else rows.shape
    if rows is not None:
        hidden = hidden.index_select(0, rows)
    hidden = hidden.reshape(-1, hidden.shape[-1])
    target = checks.target(target, shape, shard.vocab, hidden.device, IGNORE)
    cu_seqlens = checks.cu_seqlens(cu_seqlens, shape, hidden.device)
    group = group if group is not None and group.size() > 1 else None
    if group is not None and not torch.compiler.is_compiling():
        check_ranks(backend, hidden.device, group)
    if backend == "liger":
        rest = (
            checks.liger_options(temperature, bias, logit_scale, softcap),
            shard.valid,
            shard.vocab,
            IGNORE,
            group,
            reduce_gradient,
        )
        logp, entropy, sequence = liger_logprob(hidden, weight, target, cu_seqlens, *rest)
        return HeadOutput(logp.view(shape), entropy.view(shape), sequence, None)
    hidden = hidden.to(torch.promote_types(hidden.dtype, weight.dtype))
    into_cap = None if softcap is None else logit_scale / softcap
    factor = logit_scale if softcap is None else softcap  # of the kernels' logits: one with their temperature
    inputs = (hidden, weight, bias, target, cu_seqlens, checks.inv_temperature(temperature, shape, hidden, factor))
    if torch.compiler.is_compiling():
        if group is not None:
            raise ValueError("lm_head_logprob: has no group inside torch.compile; call it outside of what is compiled")
        found = torch.ops.flowrl.whole_lm_head(*inputs, *shard, into_cap, backend)
        return HeadOutput(found[0].view(shape), found[1].view(shape), found[2], found[3].view(shape))
    differentiated = any(x is not None and x.requires_grad for x in (hidden, weight, bias))
    has_backward = torch.is_grad_enabled() and differentiated  # forward cannot ask
    call = _Call(
        shard=shard,
        group=group,
        reduce_gradient=reduce_gradient,
        budget=logits_budget_bytes if has_backward else 0,
        kernels=kernels_for(backend, hidden.device),
        into_cap=into_cap,
    )
    logp, entropy, sequence, lse = _LmHead.apply(*inputs, call)
    return HeadOutput(logp.view(shape), entropy.view(shape), sequence, lse.view(shape))


class _Call(NamedTuple):
    """Arguments that forward and backward share."""

    shard: Shard
    group: dist.ProcessGroup | None
    reduce_gradient: bool
    budget: int
    kernels: Kernels
    into_cap: float | None  # what logits are multiplied with before the tanh of a soft cap

    def tiles(self, weight: Tensor) -> list[slice]:
        """This shard's tiles without its padding, equally many on every rank: some may be void."""
        width, valid = _TILE[weight.device.type], self.shard.valid
        firsts = range(0, max(1, weight.shape[0]), width)
        return [slice(min(first, valid), min(first + width, valid)) for first in firsts]

    def chunks(self, hidden: Tensor, weight: Tensor) -> Iterator[tuple[slice, dict[int, slice], slice]]:
        """(columns, the tiles that they are by number, rows) of each block of logits, chunk by chunk."""
        count, tiles = hidden.shape[0], self.tiles(weight)
        fits = _CHUNK_BYTES[weight.device.type] // (4 * _TILE[weight.device.type])  # rows of a tile
        height = max(1, fits)
        step = min(_MOST_TILES, 1 << max(0, (fits // max(1, count)).bit_length() - 1))
        for first in range(0, len(tiles), step):
            own = dict(list(enumerate(tiles))[first : first + step])
            columns = slice(own[first].start, own[max(own)].stop)
            for row in range(0, max(1, count), height):
                yield columns, own, slice(row, min(row + height, count))

    def kept_bytes(self, hidden: Tensor, weight: Tensor) -> int:
        """Bytes of logits that backward finds: the budget, and of a last chunk beyond it too, which would be made again
        beside all the others."""
        if not self.budget:
            return 0
        size = stats_dtype(hidden.dtype).itemsize
        blocks = [
            size * (rows.stop - rows.start) * (columns.stop - columns.start)
            for columns, _, rows in self.chunks(hidden, weight)
        ]
        return sum(blocks) if sum(blocks) <= self.budget + max(blocks) else self.budget

    def vocab_range(self, columns: slice) -> tuple[int, int, int]:
        """vocab_start, vocab_valid and ignore_index of a chunk."""
        return self.shard.start + columns.start, columns.stop - columns.start, IGNORE


class _LmHead(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        cu_seqlens: Tensor,
        inv_temperature: Tensor,
        call: _Call,
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        k, budget = call.kernels, call.kept_bytes(hidden, weight)
        kept: list[Tensor | None] = []
        parts: dict[int, list[Tensor]] = defaultdict(list)  # of each tile, a block of rows after another
        for columns, tiles, rows in call.chunks(hidden, weight):
            logits = _bent(_logits(hidden[rows], weight[columns]), bias, columns, call)
            of_rows = target[rows], rows_of(inv_temperature, rows)
            for number, tile in tiles.items():
                own = logits[:, tile.start - columns.start : tile.stop - columns.start]
                parts[number].append(k.logprob_stats(own, *of_rows, *call.vocab_range(tile), True))
            budget -= logits.numel() * logits.element_size()
            kept.append(logits if budget >= 0 else None)
            del logits, own  # one chunk that is not kept, not two
        shards = _gather(_stacked(parts.values()), call.group)
        logp, entropy, maximum, log_sum, sequence = k.segment_reduce(
            shards, target, inv_temperature, cu_seqlens, IGNORE
        )
        ctx.save_for_backward(hidden, weight, bias, target, cu_seqlens, inv_temperature, maximum, log_sum, entropy)
        ctx.call, ctx.kept, ctx.main_grad = call, kept, getattr(weight, "main_grad", None)
        ctx.set_materialize_grads(False)
        return logp, entropy, sequence, torch.addcmul(log_sum, maximum, inv_temperature)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, target, cu_seqlens, inv_temperature, maximum, log_sum, entropy = ctx.saved_tensors
        call, kept = ctx.call, ctx.kept
        grad = row_gradient(grads, entropy, cu_seqlens)
        of_rows = (target, grad.logp, maximum, log_sum, inv_temperature)
        d_hidden = d_weight = d_bias = reduced = None
        if ctx.needs_input_grad[0]:
            d_hidden = torch.empty_like(hidden, dtype=stats_dtype(hidden.dtype))
        if ctx.needs_input_grad[1]:
            d_weight = ctx.main_grad
            if d_weight is None:
                d_weight = torch.empty_like(weight, dtype=stats_dtype(hidden.dtype))
                d_weight[call.shard.valid :].zero_()
        if ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(bias, dtype=stats_dtype(hidden.dtype))
        for i, (columns, _, rows) in enumerate(call.chunks(hidden, weight)):
            logits, kept[i] = kept[i], None  # overwritten below; a second backward makes it again
            if logits is None:
                logits = _bent(_logits(hidden[rows], weight[columns]), bias, columns, call)
            bend = None if call.into_cap is None else logits.square().neg_().add_(1).mul_(call.into_cap)
            those = (*(rows_of(value, rows) for value in of_rows), *call.vocab_range(columns))
            d_logits = _d_logits(call.kernels, logits, those, grad.sloped(rows), hidden.dtype)
            if bend is not None:
                d_logits.mul_(bend)
            del logits, bend
            if d_bias is not None:
                d_bias[columns] += d_logits.sum(0, dtype=d_bias.dtype)
            if d_hidden is not None:
                _add_product(d_hidden[rows], d_logits, weight[columns], is_first=columns.start == 0)
                if i + 1 == len(kept) and call.group is not None and call.reduce_gradient:
                    reduced = dist.all_reduce(d_hidden, group=call.group, async_op=True)  # beside the last product
            if d_weight is not None:
                is_first = rows.start == 0 and ctx.main_grad is None
                _add_product(d_weight[columns], d_logits.t(), hidden[rows], is_first)
        if d_hidden is not None:
            if reduced is not None:
                reduced.wait()
            d_hidden = d_hidden.to(hidden.dtype)
        if d_weight is not None:
            d_weight = d_weight.to(weight.dtype) if ctx.main_grad is None else _added_already(weight)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None, None


def _added_already(weight: Tensor) -> Tensor | None:
    """The gradient to return where it is in main_grad: to there Megatron's hook adds what autograd has, unless told
    that it has been done, and to start the sum over ranks it wants to see something. An embedding that is the head too
    has its own part to add."""
    if not hasattr(weight, "grad_added_to_main_grad") or getattr(weight, "zero_out_wgrad", False):
        return None
    weight.grad_added_to_main_grad = True
    return torch.empty_like(weight)


def _stacked(parts: Iterable[list[Tensor]]) -> Tensor:
    """[tiles, 4, R] of the statistics of each tile's blocks of rows."""
    whole = [torch.cat(blocks, 1) if len(blocks) > 1 else blocks[0] for blocks in parts]
    return torch.stack(whole) if len(whole) > 1 else whole[0][None]


def _logits(hidden: Tensor, weight: Tensor) -> Tensor:
    """[R, width] in fp32: a bf16 logit of 16 to 32 has a step of 0.125, far too coarse for sums over a long answer.

    Rows begin at multiples of 16 bytes, whatever the width. `weight` may be of a narrower type.
    """
    width, dtype = weight.shape[0], stats_dtype(hidden.dtype)
    out = hidden.new_empty(hidden.shape[0], -(-width // _ALIGNED) * _ALIGNED, dtype=dtype)[:, :width]
    if not out.numel():  # a context-parallel rank without a token of an answer
        return out
    if hidden.dtype == dtype:
        return torch.mm(hidden, weight.t().to(dtype), out=out)
    if hidden.is_cuda:
        return torch.mm(hidden, weight.t(), out_dtype=dtype, out=out)
    return torch.mm(hidden.float(), weight.t().float(), out=out)


def _bent(logits: Tensor, bias: Tensor | None, columns: slice, call: _Call) -> Tensor:
    """The logits plus bias and, for a soft cap, the tanh of their share of it: in place, the cap itself is left to the
    temperature."""
    if bias is not None:
        logits.add_(bias[columns])
    return logits if call.into_cap is None else logits.mul_(call.into_cap).tanh_()


def _d_logits(
    k: Kernels, logits: Tensor, rows: tuple[Any, ...], sloped: tuple[Tensor, ...], dtype: torch.dtype
) -> Tensor:
    """The gradient of the logits, in rows as `_logits` makes them: in their place, or on a GPU in `dtype`, the type of
    its fast GEMM."""
    if logits.is_cuda and dtype != logits.dtype:
        width = logits.shape[1]
        whole = logits.as_strided((logits.shape[0], logits.stride(0)), (logits.stride(0), 1)) if width else logits
        return k.logprob_backward(whole, *rows, dtype, *sloped)[:, :width]
    k.logprob_backward_(logits, *rows, *sloped)
    return logits


def _add_product(total: Tensor, a: Tensor, b: Tensor, is_first: bool) -> None:
    """total += a @ b, or the first time total = a @ b, accumulated in the type of `total`; on a GPU inside the GEMM."""
    beta = 0.0 if is_first else 1.0  # 0: what is there is not read
    if not a.numel():
        if is_first:
            total.zero_()
    elif a.dtype == total.dtype:
        torch.addmm(total, a, b.to(a.dtype), beta=beta, out=total)
    elif a.is_cuda:
        torch.addmm(total, a, b, out_dtype=total.dtype, beta=beta, out=total)
    elif is_first:
        total.copy_(a @ b.to(a.dtype))
    else:
        total.add_(a @ b.to(a.dtype))


def _gather(stats: Tensor, group: dist.ProcessGroup | None) -> Tensor:
    """The statistics [n, 4, R] of all shards in rank order, [W n, 4, R]."""
    if group is None:
        return stats
    shards = stats.new_empty(group.size() * stats.shape[0], *stats.shape[1:])
    dist.all_gather_into_tensor(shards, stats, group=group)
    return shards
