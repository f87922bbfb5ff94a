"""Faults that a rank plants before it runs a function: what is replaced, by its name, and by what."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from contextlib import nullcontext
from inspect import signature
from typing import Any
from unittest.mock import patch

from torch import Tensor
from transformer_engine_emulation import attention, elementwise, gemm, quantization

from flowrl_mega.model import precision, te

NATIVE = "transformer_engine_torch"
QUANTIZATION = "transformer_engine.pytorch.quantization.FP8GlobalStateManager"


def nothing(*args: Any, **kwargs: Any) -> None: ...


def late_sequences(rows: Any, thd: Callable[[Any], Any] = te.thd) -> Any:
    packed = thd(rows)
    cu_seqlens = packed.cu_seqlens_q.clone()
    cu_seqlens[1:-1] += 1
    packed.cu_seqlens_q = packed.cu_seqlens_kv = cu_seqlens
    packed.max_seqlen_q = packed.max_seqlen_kv = packed.max_seqlen_q + 1
    return packed


def one_long_sequence(rows: Any, thd: Callable[[Any], Any] = te.thd) -> Any:
    packed = thd(rows)
    packed.cu_seqlens_q = packed.cu_seqlens_kv = packed.cu_seqlens_q[[0, -1]]
    packed.max_seqlen_q = packed.max_seqlen_kv = int(packed.cu_seqlens_q[-1])
    return packed


def own_amax(x: Tensor, quantizer: Any) -> Any:
    alone = quantizer.copy()
    alone.with_amax_reduction = False
    return quantization.current_cast(x, alone)


OWN_AMAX = {**quantization.CASTS, "Float8CurrentScalingQuantizer": own_amax}


def overwriting_gemm(*args: Any, **kwargs: Any) -> Any:
    given = signature(gemm.generic_gemm).bind(*args, **kwargs).arguments
    return gemm.generic_gemm(**given | {"accumulate": False, "beta": None})


def old_transpose(input: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    return quantization.fp8_transpose(input, dtype, out=out) if out is None else out


def unturned(output_grads: Tensor, *args: Any) -> Tensor:
    return elementwise.fused_rope_forward(output_grads, *args)


def other_half(tensor: Tensor, cu_seqlens: Tensor, half_idx: int) -> Tensor:
    return attention.thd_read_half_tensor(tensor, cu_seqlens, 1 - half_idx)


def unquantized(tensor: Tensor, quantizer: Any, *args: Any) -> Any:
    """Gradients, whose type is e5m2, are left in bf16."""
    if int(quantizer.dtype) == quantization.DType.kFloat8E5M2:
        return tensor
    return quantization.quantize(tensor, quantizer, *args)


def cached_weights(model: Any, fields: Callable[[Any], dict[str, Any]] = precision.layer_fields) -> dict[str, Any]:
    return fields(model) | {"disable_parameter_transpose_cache": False}


FAULTS: dict[str, tuple[str, Any]] = {
    "sequences that begin late": ("flowrl_mega.model.te.thd", late_sequences),
    "sequences that see each other": ("flowrl_mega.model.te.thd", one_long_sequence),
    "rotary gradients that are not turned back": (f"{NATIVE}.fused_rope_backward", unturned),
    "a GEMM that overwrites gradients": (f"{NATIVE}.generic_gemm", overwriting_gemm),
    "an operand left in bf16": (f"{NATIVE}.quantize", unquantized),
    "scales that are never renewed": (f"{QUANTIZATION}.reduce_and_update_fp8_tensors", nothing),
    "a transpose that is not renewed": (f"{NATIVE}.fp8_transpose", old_transpose),
    "weights quantised once": ("flowrl_mega.model.architecture.layer_fields", cached_weights),
    "FP8 that stays on": ("on_te.in_bf16", lambda policy: nullcontext()),
    "scales that are not trusted": ("flowrl_mega.checkpoint.state._trusted_scales", nullcontext),
    "extra states that are asked for": ("flowrl_mega.checkpoint.state._keep_extra_states", nothing),
    "rows that are not aligned": ("on_ranks.row_alignment", lambda *settings: 1),
    "an amax of one rank": ("transformer_engine_emulation.quantization.CASTS", OWN_AMAX),
    "the other half of the keys": (f"{NATIVE}.thd_read_half_tensor", other_half),
}


def planted(name: str, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    place, new = FAULTS[name]
    owner, _, attribute = place.rpartition(".")
    try:
        target: Any = importlib.import_module(owner)
    except ModuleNotFoundError:  # a class
        module, _, class_name = owner.rpartition(".")
        target = getattr(importlib.import_module(module), class_name)
    with patch.object(target, attribute, new):
        return function(*args, **kwargs)
