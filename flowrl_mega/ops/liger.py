"""`ops.backend = liger`: Liger-Kernel's fused linear cross entropy behind lm_head_logprob, where it is installed.

On Hopper it multiplies and reduces in one kernel and never writes logits; elsewhere it is Liger's own plain torch.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.ops.build import BuildError
from flowrl_mega.ops.scale_grad import scale_grad


def check() -> None:
    """BuildError where Liger-Kernel cannot be imported."""
    _functions()


def liger_logprob(
    hidden: Tensor,
    weight: Tensor,
    target: Tensor,
    cu_seqlens: Tensor,
    temperature: float,
    valid: int,
    vocab: int,
    ignore_index: int,
    group: dist.ProcessGroup | None,
    reduce_gradient: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """logp [R], entropy [R] and sums [B, 3] as lm_head_logprob gives them; the arguments are its own."""
    alone, tensor_parallel = _functions()
    if group is None:
        nll, entropy = alone.apply(hidden, weight[:valid], target, temperature, ignore_index, 1, True)
    else:
        if weight.shape[0] * group.size() != vocab:
            raise ValueError(
                f"ops.backend = liger: pads no vocabulary, and {vocab} ids do not divide by {group.size()} "
                "tensor-parallel ranks; use ops.backend=auto"
            )
        if not reduce_gradient:  # Liger sums the gradient over the ranks, and the caller does so again
            hidden = scale_grad(hidden, 1 / group.size())
        nll, entropy = tensor_parallel.apply(hidden, weight, target, group, temperature, ignore_index, 1, True)
    logp, entropy = -nll.float(), entropy.detach().float()
    lengths = cu_seqlens.diff()
    segment = torch.arange(lengths.numel(), device=target.device).repeat_interleave(lengths, output_size=len(target))
    rows = torch.stack([logp.double(), (target != ignore_index).double(), entropy.double()], 1)
    return logp, entropy, rows.new_zeros(lengths.numel(), 3).index_add(0, segment, rows)


def _functions() -> tuple[Any, Any]:
    try:
        ops = importlib.import_module("liger_kernel.ops")
        return ops.LigerFusedLinearScaledCrossEntropyFunction, ops.LigerFusedLinearScaledCrossEntropyTPFunction
    except (ImportError, AttributeError) as error:
        raise BuildError(f"{error}; pip install 'liger-kernel[cutedsl]>=0.8.5', or use ops.backend=auto") from None
