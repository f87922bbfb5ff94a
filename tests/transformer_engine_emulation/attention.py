"""cuDNN's fused attention over packed sequences (format thd), and what context parallelism does between its steps.

A sequence's rows are those from its offset (cu_seqlens_padded where there is one) on, as many as cu_seqlens says.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from transformer_engine_emulation.enumerations import NVTE_Fused_Attn_Backend, NVTE_Mask_Type, NVTE_QKV_Layout

Span = tuple[int, int]
MASKS = (NVTE_Mask_Type["NVTE_PADDING_MASK"], NVTE_Mask_Type["NVTE_PADDING_CAUSAL_MASK"])


def get_fused_attn_backend(parameters: Any) -> tuple[NVTE_Fused_Attn_Backend, str]:
    return NVTE_Fused_Attn_Backend.NVTE_F16_arbitrary_seqlen, ""


def fused_attn_fwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    is_training: bool,
    attn_scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: int,
    o_format: int,
    qkv_scale_inv_format: int,
    attn_bias_type: int,
    attn_mask_type: int,
    softmax_type: int,
    window_size: Any,
    bottom_right_diagonal: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    fake_dtype: torch.dtype,
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *rest: Any,
) -> list[Tensor]:
    """Output, log of the sum of exponentials [T, h, 1], state of the random generator."""
    check(qkv_layout, attn_bias_type, attn_mask_type, softmax_type, dropout, (cu_seqlens_q, cu_seqlens_kv))
    output = torch.zeros(*q.shape[:2], v.shape[2])
    lse = torch.full((*q.shape[:2], 1), -torch.inf)
    offsets = (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
    for (a, b), (c, d) in sequences(*offsets):
        assert b <= q.shape[0] and d <= k.shape[0], "sequences end beyond the rows"
        assert b - a <= max_seqlen_q and d - c <= max_seqlen_kv, "a sequence is longer than max_seqlen"
        logits = scores(q[a:b], k[c:d], attn_scale, attn_mask_type)
        total = logits.logsumexp(-1)
        weights = (logits - total[..., None]).exp()
        output[a:b] = torch.einsum("hqk,khd->qhd", weights, for_heads(v[c:d], q.shape[1]))
        lse[a:b, :, 0] = total.t()
    return [output.to(q.dtype), lse, torch.zeros(2, dtype=torch.int64)]


def fused_attn_bwd(
    max_seqlen_q: int,
    max_seqlen_kv: int,
    attn_scale: float,
    dropout: float,
    fast_zero_fill: bool,
    qkv_layout: int,
    o_format: int,
    do_format: int,
    dqkv_layout: int,
    qkv_scale_inv_format: int,
    do_scale_inv_format: int,
    attn_bias_type: int,
    attn_mask_type: int,
    softmax_type: int,
    window_size: Any,
    bottom_right_diagonal: bool,
    deterministic: bool,
    cu_seqlens_q: Tensor,
    cu_seqlens_kv: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    o: Tensor,
    d_o: Tensor,
    fake_dtype: torch.dtype,
    aux_ctx_tensors: list[Tensor],
    cu_seqlens_q_padded: Tensor | None,
    cu_seqlens_kv_padded: Tensor | None,
    *rest: Any,
) -> list[Tensor | None]:
    """Gradients of q, k and v, from the output and the log of the sum that are handed in, which may be a ring's."""
    check(qkv_layout, attn_bias_type, attn_mask_type, softmax_type, dropout, (cu_seqlens_q, cu_seqlens_kv))
    dq, dk, dv = (torch.zeros(x.shape) for x in (q, k, v))
    heads, groups = q.shape[1], k.shape[1]
    d_o, o = (x.view(*q.shape[:2], -1).float() for x in (d_o, o))
    lse = aux_ctx_tensors[0].view(q.shape[0], heads)
    offsets = (cu_seqlens_q, cu_seqlens_kv, cu_seqlens_q_padded, cu_seqlens_kv_padded)
    for (a, b), (c, d) in sequences(*offsets):
        p = (scores(q[a:b], k[c:d], attn_scale, attn_mask_type) - lse[a:b].t()[..., None]).exp()
        dp = torch.einsum("qhd,khd->hqk", d_o[a:b], for_heads(v[c:d], heads))
        ds = p * (dp - (d_o[a:b] * o[a:b]).sum(-1).t()[..., None]) * attn_scale
        dq[a:b] = torch.einsum("hqk,khd->qhd", ds, for_heads(k[c:d], heads))
        by_head = torch.einsum("hqk,qhd->khd", ds, q[a:b].float()), torch.einsum("hqk,qhd->khd", p, d_o[a:b])
        dk[c:d], dv[c:d] = (x.view(d - c, groups, heads // groups, -1).sum(2) for x in by_head)
    return [dq.to(q.dtype), dk.to(q.dtype), dv.to(q.dtype), None, None]


def check(layout: int, bias: int, mask: int, softmax: int, dropout: float, offsets: tuple[Tensor, Tensor]) -> None:
    if layout != NVTE_QKV_Layout["NVTE_THD_THD_THD"] or mask not in MASKS or bias or softmax or dropout:
        raise NotImplementedError(f"fused attention with layout {layout!r}, mask {mask!r}, ...: not emulated")
    assert all(cu_seqlens.dtype == torch.int32 for cu_seqlens in offsets)


def sequences(q: Tensor, kv: Tensor, q_padded: Tensor | None, kv_padded: Tensor | None) -> Iterator[tuple[Span, Span]]:
    """The rows of each sequence's queries, and those of its keys and values."""
    return zip(spans(q, q_padded), spans(kv, kv_padded), strict=True)


def spans(cu_seqlens: Tensor, padded: Tensor | None) -> list[Span]:
    starts = (cu_seqlens if padded is None else padded).tolist()
    return [(start, start + n) for start, n in zip(starts, cu_seqlens.diff().tolist(), strict=False)]


def for_heads(x: Tensor, heads: int) -> Tensor:
    """Keys or values, once for each head of queries."""
    return x.float().repeat_interleave(heads // x.shape[1], 1)


def scores(q: Tensor, k: Tensor, scale: float, mask: int) -> Tensor:
    logits = torch.einsum("qhd,khd->hqk", q.float(), for_heads(k, q.shape[1])) * scale
    if mask != NVTE_Mask_Type["NVTE_PADDING_CAUSAL_MASK"]:
        return logits
    assert logits.shape[1] == logits.shape[2], "a causal mask over unlike lengths"
    return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)


# A rank of context parallelism holds two halves of each sequence, one after the other; a ring's step concerns one or
# both. "packed" says that the log of the sums has format thd too: [heads, T].


def halves(cu_seqlens: Tensor) -> list[tuple[Span, Span]]:
    ends = cu_seqlens.tolist()
    assert all(end % 2 == 0 for end in ends), f"sequences of odd length: {ends}"
    return [((a, (a + b) // 2), ((a + b) // 2, b)) for a, b in zip(ends, ends[1:], strict=False)]


def thd_read_half_tensor(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    dim = 0 if tensor.dim() == 3 else 1  # keys and values may come as one tensor
    parts = [
        tensor.narrow(dim, both[half_idx][0], both[half_idx][1] - both[half_idx][0]) for both in halves(cu_seqlens)
    ]
    return torch.cat(parts, dim)


def thd_second_half_lse_correction(lse: Tensor, lse_per_step: Tensor, cu_seqlens: Tensor, lse_packed: bool) -> None:
    assert lse_packed
    at = 0
    for _, (a, b) in halves(cu_seqlens):
        lse[:, a:b] = torch.logaddexp(lse[:, a:b], lse_per_step[:, at : at + b - a])
        at += b - a


def thd_read_second_half_lse(lse: Tensor, cu_seqlens: Tensor, lse_packed: bool, second_half_lse_seqlen: int) -> Tensor:
    assert lse_packed
    second = torch.cat([lse[:, a:b] for _, (a, b) in halves(cu_seqlens)], 1)
    return torch.nn.functional.pad(second, (0, second_half_lse_seqlen - second.shape[1]))


def thd_out_correction(
    out: Tensor,
    out_per_step: Tensor,
    old_lse: Tensor,
    lse: Tensor,
    lse_per_step: Tensor,
    cu_seqlens: Tensor,
    only_second_half: bool,
    lse_packed: bool,
) -> None:
    """Adds a step's output, both with the weights of the sums in `lse`."""
    assert lse_packed and out.dim() == 3
    spans = [second for _, second in halves(cu_seqlens)] if only_second_half else [(0, int(cu_seqlens[-1]))]
    step, at = out_per_step.view(-1, *out.shape[1:]).float(), 0
    for a, b in spans:
        here = slice(at, at + b - a)
        keep = (old_lse[:, a:b] - lse[:, a:b]).exp().t()[..., None]
        add = (lse_per_step[:, here] - lse[:, a:b]).exp().t()[..., None]
        out[a:b] = (out[a:b].float() * keep + step[here] * add).to(out.dtype)
        at += b - a


def thd_grad_correction(
    grad: Tensor, grad_per_step: Tensor, cu_seqlens: Tensor, first_half: str, second_half: str
) -> None:
    """What each half does with a step's gradient: "add", "copy", "none", or "zero" without one."""
    whole, at = grad_per_step.shape[-3] == grad.shape[-3], 0
    for both in halves(cu_seqlens):
        for (a, b), what in zip(both, (first_half, second_half), strict=True):
            target = grad.narrow(-3, a, b - a)
            if what == "zero":
                target.zero_()
            elif what != "none":
                step = grad_per_step.narrow(-3, a if whole else at, b - a)
                target.copy_(step) if what == "copy" else target.add_(step)
                at += b - a
