"""What the ops should give: torch's log_softmax in float64 on the same rounded logits, and how far off they may be."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

IGNORED = -100
SETS = ("plain", "avx2", "avx512")  # the CPU kernels' instruction sets, as csrc numbers them
BACKENDS = ("torch", *SETS, "cuda")  # what the fixture `backend` can be; "cuda" is csrc/cuda emulated
OF_THE_CPU = BACKENDS[:-1]  # these have kernels for float64, and their conversions of halves are their own
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16, "fp64": torch.float64}

# (relative, absolute). For logits of float64 the bounds are those of the oracle's own rounding.
LOGP, ENTROPY = (2e-7, 1e-6), (0.0, 2e-6)
LOGP_64, ENTROPY_64 = (1e-13, 2e-12), (0.0, 2e-12)
# Half gradients: one rounding, and for a target of p near 1 what float32 cannot tell 1 - p from (at 1/temperature < 2).
GRADIENT = {
    torch.float32: (0.0, 1e-6),
    torch.bfloat16: (2**-8, 2**-23),
    torch.float16: (2**-10, 2**-23),
    torch.float64: (1e-11, 1e-14),
}


class Result(NamedTuple):
    logp: Tensor  # [T]
    entropy: Tensor  # [T]
    gradient: Tensor  # [T, V] of sum(grad * logp) with respect to the logits


def oracle(
    logits: Tensor,
    target: Tensor,
    temperature: float | Tensor = 1.0,
    grad: Tensor | None = None,
    valid: int | None = None,
) -> Result:
    """Row by row with the columns that count; ignored rows and padded columns are 0, whatever they hold."""
    read = target != IGNORED
    x = logits[read, :valid].detach().double().requires_grad_()
    tau = temperature.double()[read, None] if isinstance(temperature, Tensor) else temperature
    logps = torch.log_softmax(x / tau, -1)
    p = logps.exp()
    picked = logps.gather(1, target[read, None])[:, 0]
    picked.backward(torch.ones_like(picked) if grad is None else grad[read].double())
    logp, entropy = logits.new_zeros(2, len(target), dtype=torch.float64)
    gradient = torch.zeros_like(logits, dtype=torch.float64)
    logp[read], entropy[read] = picked.detach(), -torch.where(p == 0, 0.0, p * logps).sum(-1).detach()
    padded = gradient.new_zeros(int(read.sum()), logits.shape[1])
    padded[:, :valid] = x.grad
    gradient[read] = padded
    return Result(logp, entropy, gradient)


def excess(found: Tensor, wanted: Tensor, bound: tuple[float, float]) -> float:
    """The largest error in units of what is allowed: above 1 is wrong. NaN and infinities must be where they should."""
    if found.shape != wanted.shape:
        return torch.inf
    relative, absolute = bound
    odd = ~wanted.isfinite()
    same = (found.double() == wanted) | (found.isnan() & wanted.isnan())
    error = (found.double() - wanted).abs() / (relative * wanted.abs() + absolute)
    error = torch.where(same, 0.0, torch.where(odd | error.isnan(), torch.inf, error))
    return error.max().item() if error.numel() else 0.0


def agrees(found: Result, wanted: Result) -> None:
    """Within the bounds for logits of the gradient's type."""
    double = found.gradient.dtype == torch.float64
    assert excess(found.logp, wanted.logp, LOGP_64 if double else LOGP) <= 1
    assert excess(found.entropy, wanted.entropy, ENTROPY_64 if double else ENTROPY) <= 1
    assert excess(found.gradient, wanted.gradient, GRADIENT[found.gradient.dtype]) <= 1


def same_bits(a: Tensor, b: Tensor) -> bool:
    """NaN equals NaN, and 0 is not -0."""
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.detach().view(integers), b.detach().view(integers))


class Case(NamedTuple):
    logits: Tensor  # [T, V]
    target: Tensor  # [T]
    grad: Tensor  # [T] in -1..1, of the loss with respect to each log-prob


def case(rows: int, columns: int, dtype: torch.dtype = torch.float32, scale: float = 3.0, seed: int = 0) -> Case:
    """Logits of standard deviation `scale` (0.02 is flat, 30 nearly one-hot), rounded to `dtype`."""
    g = torch.Generator().manual_seed(seed)
    logits = (scale * torch.randn(rows, columns, generator=g)).to(dtype)
    target = torch.randint(max(1, columns), (rows,), generator=g)
    grad = 2 * torch.rand(rows, generator=g) - 1
    return Case(logits, target, grad.double() if dtype == torch.float64 else grad)
