"""logprob and lm_head_logprob inside torch.compile: each direction is one op that the compiler does not look into.

They run the same code as without it. But an op may not hand on anything beside its results, so the gradient of logits
lies beside them and not in their place, and the head makes its logits again in the backward pass. What a target or an
offset holds is checked when the op runs.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowrl_mega.ops import checks
from flowrl_mega.ops.kernels import kernels_for
from flowrl_mega.ops.lm_head import IGNORE, Shard, _Call, _LmHead
from flowrl_mega.ops.logprob import _LogProb
from flowrl_mega.ops.torch_ops import stats_dtype

_RESULTS = "(Tensor logp, Tensor entropy, Tensor sequence, Tensor lse, Tensor maximum, Tensor log_sum)"
_ROWS = "Tensor target, Tensor cu_seqlens, Tensor inv_temperature"
_SAVED = f"{_ROWS}, Tensor entropy, Tensor maximum, Tensor log_sum"
_GRADS = "Tensor? d_logp, Tensor? d_entropy, Tensor? d_sequence, Tensor? d_lse"
_OF_LOGITS = "int valid, int ignore_index, str backend"
_OF_HEAD = "int start, int valid, int vocab, float? into_cap, str backend"


class _Context:
    """What the functions keep from forward to backward, without autograd."""

    logits: Tensor | None
    main_grad: None = None

    def __init__(self, *saved: Tensor | None, **rest: Any) -> None:
        self.saved_tensors: tuple[Any, ...] = saved
        self.__dict__.update(rest)

    def save_for_backward(self, *saved: Tensor) -> None:
        self.saved_tensors = saved

    def set_materialize_grads(self, value: bool) -> None:
        """They are not."""


def _check(target: Tensor, cu_seqlens: Tensor, vocab: int, ignore_index: int) -> None:
    checks.target(target, target.shape, vocab, target.device, ignore_index)
    checks.cu_seqlens(cu_seqlens, target.shape, target.device)


@torch.library.custom_op(
    "flowrl::whole_logprob", mutates_args=(), schema=f"(Tensor logits, {_ROWS}, {_OF_LOGITS}) -> {_RESULTS}"
)
def whole_logprob(
    logits: Tensor, target: Tensor, cu_seqlens: Tensor, inv_temperature: Tensor, valid: int, ignore: int, backend: Any
) -> tuple[Tensor, ...]:
    _check(target, cu_seqlens, valid, ignore)
    context, kernels = _Context(), kernels_for(backend, logits.device)
    found = _LogProb.forward(context, logits, target, cu_seqlens, inv_temperature, valid, ignore, False, kernels)
    _, maximum, log_sum, *_ = context.saved_tensors
    return *found, maximum, log_sum


@torch.library.custom_op(
    "flowrl::whole_logprob_backward",
    mutates_args=(),
    schema=f"(Tensor logits, {_SAVED}, {_GRADS}, {_OF_LOGITS}) -> Tensor",
)
def whole_logprob_backward(logits: Tensor, *rest: Any) -> Tensor:
    target, cu_seqlens, inv_temperature, entropy, maximum, log_sum, *grads, valid, ignore_index, backend = rest
    saved = (target, maximum, log_sum, inv_temperature, cu_seqlens, entropy)
    of_call = (valid, ignore_index, False, kernels_for(backend, logits.device))
    context = _Context(*saved, logits=logits, version=logits._version, rest=of_call)
    d_logits: Tensor = _LogProb.backward(context, *grads)[0]  # type: ignore[assignment]
    return d_logits


@torch.library.custom_op(
    "flowrl::whole_lm_head",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, {_ROWS}, {_OF_HEAD}) -> {_RESULTS}",
)
def whole_lm_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, cu_seqlens: Tensor, tau: Tensor, *of_head: Any
) -> tuple[Tensor, ...]:
    call = _call(hidden.device, *of_head)
    _check(target, cu_seqlens, call.shard.vocab, IGNORE)
    context = _Context()
    found = _LmHead.forward(context, hidden, weight, bias, target, cu_seqlens, tau, call)
    *_, maximum, log_sum, _ = context.saved_tensors
    return *found, maximum, log_sum


@torch.library.custom_op(
    "flowrl::whole_lm_head_backward",
    mutates_args=(),
    schema=f"(Tensor hidden, Tensor weight, Tensor? bias, {_SAVED}, {_GRADS}, {_OF_HEAD}, bool[] needed) "
    "-> (Tensor, Tensor, Tensor)",
)
def whole_lm_head_backward(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    target, cu_seqlens, tau, entropy, maximum, log_sum, *others, needed = rest
    grads, of_head = others[:4], others[4:]
    saved = (hidden, weight, bias, target, cu_seqlens, tau, maximum, log_sum, entropy)
    call = _call(hidden.device, *of_head)
    kept = [None for _ in call.chunks(hidden, weight)]
    context = _Context(*saved, call=call, kept=kept, needs_input_grad=needed)
    found = _LmHead.backward(context, *grads)[:3]
    return tuple(hidden.new_empty(0) if x is None else x for x in found)


def _call(device: torch.device, start: int, valid: int, vocab: int, into_cap: float | None, backend: Any) -> _Call:
    kernels = kernels_for(backend, device)
    return _Call(Shard(start, valid, vocab), None, True, budget=0, kernels=kernels, into_cap=into_cap)


# What the compiler is told of them


def _results(target: Tensor, cu_seqlens: Tensor, dtype: torch.dtype) -> tuple[Tensor, ...]:
    logp, entropy, lse, maximum, log_sum = (target.new_empty(target.shape, dtype=dtype) for _ in range(5))
    sequence = target.new_empty(cu_seqlens.shape[0] - 1, 3, dtype=torch.float64)
    return logp, entropy, sequence, lse, maximum, log_sum


@whole_logprob.register_fake
def _(logits: Tensor, target: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _results(target, cu_seqlens, stats_dtype(logits.dtype))


@whole_logprob_backward.register_fake
def _(logits: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(logits.shape)


@whole_lm_head.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Any, target: Tensor, cu_seqlens: Tensor, *_: Any) -> tuple[Tensor, ...]:
    return _results(target, cu_seqlens, stats_dtype(hidden.dtype))


@whole_lm_head_backward.register_fake
def _(hidden: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    inputs = zip((hidden, weight, bias), rest[-1], strict=True)
    return tuple(x.new_empty(x.shape) if wanted and x is not None else hidden.new_empty(0) for x, wanted in inputs)


def _save_logprob(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    *tensors, valid, ignore_index, backend = inputs
    _, entropy, _, _, maximum, log_sum = output
    ctx.save_for_backward(*tensors, entropy, maximum, log_sum)
    ctx.rest = (valid, ignore_index, backend)
    ctx.set_materialize_grads(False)


def _logprob_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    return whole_logprob_backward(*ctx.saved_tensors, *grads[:4], *ctx.rest), *[None] * 6


def _save_head(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    _, entropy, _, _, maximum, log_sum = output
    ctx.save_for_backward(*inputs[:6], entropy, maximum, log_sum)
    ctx.rest = inputs[6:]
    ctx.set_materialize_grads(False)


def _head_gradients(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    needed = list(ctx.needs_input_grad[:3])
    found = whole_lm_head_backward(*ctx.saved_tensors, *grads[:4], *ctx.rest, needed)
    return *(x if wanted else None for x, wanted in zip(found, needed, strict=True)), *[None] * 8


whole_logprob.register_autograd(_logprob_gradients, setup_context=_save_logprob)
whole_lm_head.register_autograd(_head_gradients, setup_context=_save_head)
