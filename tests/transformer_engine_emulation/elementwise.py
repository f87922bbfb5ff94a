"""Norms, rotary positions, the optimizer's loops over many tensors: all that is neither a GEMM, FP8 nor attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from transformer_engine_emulation.enumerations import DType
from transformer_engine_emulation.quantization import TORCH_DTYPE, quantize


def rmsnorm_fwd(
    input: Tensor,
    weight: Tensor,
    eps: float,
    ln_out: Any,
    quantizer: Any,
    otype: int,
    sm_margin: int,
    zero_centered_gamma: bool,
) -> tuple[Any, None, Tensor]:
    assert not zero_centered_gamma
    x = input.float()
    rsigma = (x.square().mean(-1) + eps).rsqrt()
    y = (x * rsigma[..., None] * weight.float()).to(TORCH_DTYPE[DType(otype)])
    return (y if quantizer is None else quantize(y, quantizer)), None, rsigma.reshape(-1)


def rmsnorm_bwd(
    dz: Tensor, x: Tensor, rsigma: Tensor, gamma: Tensor, sm_margin: int, zero_centered_gamma: bool
) -> tuple[Tensor, Tensor]:
    assert not zero_centered_gamma
    normed = x.reshape(-1, x.shape[-1]).float() * rsigma[:, None]
    d = dz.reshape(normed.shape).float()
    g = d * gamma.float()
    dx = rsigma[:, None] * (g - normed * (g * normed).mean(-1, keepdim=True))
    return dx.to(x.dtype).view(x.shape), (d * normed).sum(0).to(gamma.dtype)


def fused_rope_forward(
    input: Tensor,
    freqs: Tensor,
    start_positions: Any,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Any,
    cp_size: int,
    cp_rank: int,
    *options: Any,
) -> Tensor:
    return rotated(input, freqs, start_positions, interleaved, cu_seqlens, cp_size, 1)


def fused_rope_backward(
    output_grads: Tensor,
    freqs: Tensor,
    start_positions: Any,
    qkv_format: int,
    interleaved: bool,
    cu_seqlens: Any,
    cp_size: int,
    cp_rank: int,
    *options: Any,
) -> Tensor:
    return rotated(output_grads, freqs, start_positions, interleaved, cu_seqlens, cp_size, -1)


def rotated(
    x: Tensor, freqs: Tensor, start: Any, interleaved: bool, cu_seqlens: Any, cp_size: int, sign: int
) -> Tensor:
    """x [s, b, h, d] by an angle for each row: format sbhd."""
    if interleaved or start is not None or cu_seqlens is not None or cp_size != 1:
        raise NotImplementedError("fused_rope in other formats than sbhd: not emulated")
    angle = freqs[: x.shape[0]].float()
    width = angle.shape[-1]
    first, second = x[..., :width].float().chunk(2, -1)
    turned = torch.cat([first, second], -1) * angle.cos() + sign * torch.cat([-second, first], -1) * angle.sin()
    return torch.cat([turned.to(x.dtype), x[..., width:]], -1).contiguous()


def multi_tensor_l2norm(
    chunk_size: int, noop: Tensor, tensor_lists: list[list[Tensor]], per_tensor: bool = False
) -> tuple[Tensor, Tensor]:
    each = torch.stack([x.float().norm() for x in tensor_lists[0]])
    return each.norm().view(1), each if per_tensor else torch.zeros(1)


def multi_tensor_scale(chunk_size: int, is_infinite: Tensor, tensor_lists: list[list[Tensor]], scale: float) -> None:
    for source, target in zip(*tensor_lists, strict=True):
        target.copy_(source.float() * scale)


def multi_tensor_adam(
    chunk_size: int,
    noop: Tensor,
    tensor_lists: list[list[Tensor]],
    lr: float,
    beta1: float,
    beta2: float,
    epsilon: float,
    step: int,
    mode: int,
    bias_correction: int,
    weight_decay: float,
) -> None:
    """Lists of gradients, parameters, both moments and, where parameters are bf16, their fp32 masters."""
    assert mode == 1, "AdamW"
    corrections = (1 - beta1**step, 1 - beta2**step) if bias_correction else (1.0, 1.0)
    for gradient, parameter, m, v, *master in zip(*tensor_lists, strict=True):
        g, weight = gradient.float(), (master[0] if master else parameter).float()
        m.mul_(beta1).add_(g, alpha=1 - beta1)
        v.mul_(beta2).addcmul_(g, g, value=1 - beta2)
        step_by = (m / corrections[0]) / ((v / corrections[1]).sqrt() + epsilon) + weight_decay * weight
        new = weight - lr * step_by
        for target in (parameter, *master):
            target.copy_(new)


def swap_first_dims(tensor: Tensor, *, out: Tensor | None = None) -> Tensor:
    swapped = tensor.transpose(0, 1).contiguous()
    return swapped if out is None else out.copy_(swapped.view(out.shape))
