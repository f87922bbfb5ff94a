"""A share of a gradient: for what every rank computes alike and a collective then sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def share_of_gradient(x: Tensor, share: float) -> Tensor:
    """x itself; its gradient is multiplied by `share`."""
    return _Share.apply(x, share)


class _Share(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, share: float) -> Tensor:
        ctx.share = share
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] * ctx.share, None
