"""What is right: log-softmax in float64 on the very logits (rounded to their type) that a provider was given."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from measure import Case, Result
from torch import Tensor

CHUNK_BYTES = 256 << 20  # of one float64 matrix
BF16_STEP = 2.0**-8


class Error(NamedTuple):
    largest: float  # |found - exact|
    allowance: float  # the same in units of what is allowed: above 1 is wrong, and so is NaN


class Exact(NamedTuple):
    logp: Tensor  # [T] float64
    entropy: Tensor  # [T] float64
    d_logits: Tensor  # [T, V] float64


def exact(logits: Tensor, target: Tensor, upstream: Tensor) -> Exact:
    log_p = torch.log_softmax(logits.double(), -1)
    p = log_p.exp()
    onehot = torch.zeros_like(p).scatter_(1, target[:, None], 1.0)
    entropy = -(p * log_p).sum(-1)
    return Exact(log_p.gather(1, target[:, None])[:, 0], entropy, upstream.double()[:, None] * (onehot - p))


def logits_errors(case: Case, result: Result) -> dict[str, Error]:
    """For providers that are given logits. Allowed: logp 2e-7 |logp| + 1e-6, entropy 2e-6, gradient 1e-6, and 2^-8 of
    its size where it is rounded to bf16."""
    (logits,) = case.leaves
    relative = BF16_STEP if logits.dtype == torch.bfloat16 else 0.0
    assert result.entropy is not None
    errors: dict[str, Error] = {}
    for rows in chunks(case):
        wanted = exact(logits[rows], case.target[rows], case.upstream[rows])
        found = {
            "logp": (result.logp[rows], wanted.logp, 2e-7 * wanted.logp.abs() + 1e-6),
            "entropy": (result.entropy[rows], wanted.entropy, torch.full_like(wanted.entropy, 2e-6)),
        }
        if result.gradients:
            d_logits = wanted.d_logits
            found["gradient"] = (result.gradients[0][rows], d_logits, relative * d_logits.abs() + 1e-6)
        for name, values in found.items():
            errors[name] = _worse(errors.get(name, Error(0.0, 0.0)), _error(*values))
    return errors


def head_errors(case: Case, result: Result) -> dict[str, Error]:
    """For providers that are given hidden states and the head's weight, in parts of the largest exact value. The GEMMs'
    rounding is theirs to choose (bf16 logits too): what is allowed tells wrong from rounded, no more."""
    hidden, weight = (leaf.double() for leaf in case.leaves)
    allowed = 1e-4 if case.leaves[0].dtype == torch.float32 else 2.0**-5
    d_weight = torch.zeros_like(weight)
    parts = []
    for rows in chunks(case):
        part = exact(hidden[rows] @ weight.t(), case.target[rows], case.upstream[rows])
        parts.append((part.logp, part.entropy, part.d_logits @ weight))
        d_weight += part.d_logits.t() @ hidden[rows]
    logp, entropy, d_hidden = (torch.cat(pieces) for pieces in zip(*parts, strict=True))
    found = {"logp": (result.logp, logp), "entropy": (result.entropy, entropy)}
    if result.gradients:
        found |= {"d_hidden": (result.gradients[0], d_hidden), "d_weight": (result.gradients[1], d_weight)}
    return {
        name: _error(value, wanted, torch.full_like(wanted, allowed * wanted.abs().max().item()))
        for name, (value, wanted) in found.items()
        if value is not None
    }


def chunks(case: Case) -> list[slice]:
    tokens, vocab = case.target.shape[0], case.leaves[-1].shape[-1 if len(case.leaves) == 1 else 0]
    size = max(1, CHUNK_BYTES // (8 * vocab))
    return [slice(first, first + size) for first in range(0, tokens, size)]


def _error(found: Tensor, wanted: Tensor, allowed: Tensor) -> Error:
    difference = (found.double() - wanted).abs()
    return Error(difference.max().item(), (difference / allowed).max().item())  # max keeps NaN


def _worse(a: Error, b: Error) -> Error:
    return Error(*(x if math.isnan(x) or x > y else y for x, y in zip(a, b, strict=True)))


def wrong(provider: str, errors: dict[str, Error]) -> str | None:
    """What is wrong with a result, if anything is. Others are allowed more than csrc is: the entropy of a rounded
    log-softmax, or torch.compile's exp and sums on CPU, are 2 to 4 times less exact, and still the same function."""
    limit = 1.0 if provider.startswith("native") else 10.0
    for name, error in errors.items():
        if not error.allowance <= limit:
            return f"{name} off by {error.largest:.1e}, {error.allowance:.1f}x what csrc is allowed"
    return None
