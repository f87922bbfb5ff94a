"""Gradients of the entropy and of the softmax's sum, beside that of the log-prob, against float64 autograd."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from oracle import DTYPES, GRADIENT, IGNORED, LOGP, OF_THE_CPU, Case, case, excess, same_bits
from test_lm_head import chunked, head_case
from torch import Tensor

from flowrl_mega.ops import Shard, lm_head_logprob, logprob
from flowrl_mega.ops.kernels import Kernels

# Around a vector and the unrolled loop, a last partial vector, more than a block.
COLUMNS = [1, 7, 33, 257, 4113]
WEIGHTS = {"entropy": (0, 1, 0), "log of the sum": (0, 0, 1), "all": (1, 1, 1)}


class Rows(NamedTuple):
    logp: Tensor
    entropy: Tensor
    lse: Tensor


def exact(logits: Tensor, target: Tensor, temperature: float | Tensor = 1.0, valid: int | None = None) -> Rows:
    """Of float64 logits; ignored rows are 0."""
    read = target != IGNORED
    x = logits[read, :valid] / (temperature[read, None] if isinstance(temperature, Tensor) else temperature)
    logps = torch.log_softmax(x, -1)
    p = logps.exp()
    found = (
        logps.gather(1, target[read, None])[:, 0],
        -(p * torch.where(p == 0, 0.0, logps)).sum(-1),
        torch.logsumexp(x, -1),
    )
    zero = torch.zeros(len(target), dtype=torch.float64)
    return Rows(*(zero.masked_scatter(read, value) for value in found))


def gradients(rows: int, weights: tuple[int, int, int]) -> list[Tensor]:
    """Of the loss with respect to log-prob, entropy and log of the sum."""
    g = torch.Generator().manual_seed(1)
    return [w * (2 * torch.rand(rows, generator=g) - 1) for w in weights]


def wanted_gradient(c: Case, grads: list[Tensor], temperature: float | Tensor = 1.0, **rest) -> Tensor:
    x = c.logits.detach().double().requires_grad_()
    torch.autograd.backward(exact(x, c.target, temperature, **rest), [g.double() for g in grads])
    return x.grad


def ours(c: Case, grads: list[Tensor], **options) -> Tensor:
    logits = c.logits.clone().requires_grad_()
    out = logprob(logits, c.target, **options)
    used = [(value, g) for value, g in zip((out.logp, out.entropy, out.lse), grads, strict=True) if g.any()]
    torch.autograd.backward([value for value, _ in used], [g.to(value.dtype) for value, g in used])
    return logits.grad


@pytest.mark.parametrize("weights", WEIGHTS)
@pytest.mark.parametrize("columns", COLUMNS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_equals_float64_autograd(dtype, columns, weights, backend):
    """Flat, usual and nearly one-hot rows, at temperatures below and above 1."""
    parts = [case(3, columns, DTYPES[dtype], scale, seed) for seed, scale in enumerate((0.02, 3.0, 30.0))]
    c = Case(*(torch.cat(tensors) for tensors in zip(*parts, strict=True)))
    c.target[4] = IGNORED
    grads = gradients(9, WEIGHTS[weights])
    relative, absolute = GRADIENT[DTYPES[dtype]]
    for temperature in (0.6, 1.0, 1.7):
        wanted = wanted_gradient(c, grads, temperature)
        for inplace in (True, False):
            found = ours(c, grads, temperature=temperature, inplace_backward=inplace, backend=backend)
            assert excess(found, wanted, (relative, max(absolute, 2e-6 if dtype != "fp64" else 1e-13))) <= 1
        assert torch.equal(found[4], torch.zeros_like(found[4]))


def test_lse(backend):
    """log sum exp(logits / temperature), as a z-loss takes it; 0 in ignored rows."""
    c, tau = case(6, 300), torch.linspace(0.6, 1.7, 6)
    c.target[1] = IGNORED
    found = logprob(c.logits, c.target, temperature=tau, backend=backend).lse
    assert found[1] == 0 and excess(found, exact(c.logits.double(), c.target, tau.double()).lse, LOGP) <= 1


def test_masked_logits(backend):
    """A logit of -inf has p log p = 0: no NaN comes of it, and no gradient goes to it; also where it is the target."""
    c = case(4, 70)
    c.logits[:, ::3] = -torch.inf
    c.target[:] = torch.tensor([1, 2, 4, 5])
    grads = gradients(4, (1, 1, 1))
    found = ours(c, grads, backend=backend)
    kept = c._replace(logits=c.logits[:, c.logits[0] > -torch.inf])
    kept = kept._replace(target=torch.tensor([0, 1, 2, 3]))
    assert not found[:, ::3].any()
    mask = torch.ones(70, dtype=torch.bool)
    mask[::3] = False
    assert excess(found[:, mask], wanted_gradient(kept, grads), (0.0, 2e-6)) <= 1
    certain = c._replace(target=torch.zeros(4, dtype=torch.long))
    assert not ours(certain, gradients(4, (0, 1, 0)), backend=backend)[:, ::3].any()


def test_padded_columns_and_rows_without_gradient(backend):
    """Neither is read: NaN there stays where it is."""
    c = case(6, 100)
    c.logits[:, 90:] = torch.nan
    c.target.remainder_(90)
    grads = [g * (torch.arange(6) != 2) for g in gradients(6, (1, 1, 1))]
    wanted = wanted_gradient(c, grads, valid=90)
    c.logits[2] = torch.nan
    found = ours(c, grads, vocab_valid=90, backend=backend)
    assert not found[2].any() and not found[:, 90:].any()
    rest = torch.arange(6) != 2
    assert excess(found[rest], wanted[rest], (0.0, 2e-6)) <= 1


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_comes_out(value, backend):
    c = case(2, 300)
    c.logits[0, 123] = value
    found = ours(c, gradients(2, (0, 1, 0)), backend=backend)
    assert found[0].isnan().any() and found[1].isfinite().all()


def test_log_probs_alone_cost_and_give_what_they_did(backend, kernels):
    """To the bit: rows of offset and slope 0 take the same path, and without them nothing is computed. The log is the
    kernels' own: torch's has another last bit on some processors."""
    c = case(9, 3000)
    tau, zeros = torch.ones(1), torch.zeros(9)
    stats = kernels.logprob_stats(c.logits, c.target, tau, 0, 3000, IGNORED, True)
    _, _, maximum, log_sum, _ = kernels.segment_reduce(stats[None], c.target, tau, torch.tensor([0, 9]), IGNORED)
    rows = (c.target, c.grad, maximum, log_sum, tau, 0, 3000, IGNORED)
    plain = kernels.logprob_backward(c.logits, *rows, torch.float32)
    assert same_bits(kernels.logprob_backward(c.logits, *rows, torch.float32, zeros, zeros), plain)
    assert same_bits(ours(c, [c.grad, zeros, zeros], backend=backend), plain) or backend == "torch"


def test_sums_of_entropy_hand_their_gradient_to_each_row(backend):
    """Through the third column of the sequences' sums."""
    c, offsets = case(5, 33), torch.tensor([0, 2, 2, 5])
    d_sums = torch.tensor([[0.3, 5.0, -1.0], [9.0, 9.0, 9.0], [0.0, 1.0, 0.7]])
    logits = c.logits.clone().requires_grad_()
    logprob(logits, c.target, offsets, backend=backend).sequence.backward(d_sums.double())
    each = d_sums.repeat_interleave(offsets.diff(), 0)
    wanted = wanted_gradient(c, [each[:, 0], each[:, 2], torch.zeros(5)])
    assert excess(logits.grad, wanted, (0.0, 2e-6)) <= 1


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
@pytest.mark.parametrize("temperature", [0.6, "by row"])
def test_gradcheck(temperature, backend):
    """All outputs against finite differences in float64."""
    c = case(5, 11, torch.float64)
    target = c.target.clamp(max=8)
    target[1] = IGNORED
    tau = torch.linspace(0.6, 1.7, 5) if temperature == "by row" else temperature

    def outputs(x: Tensor) -> tuple[Tensor, ...]:
        rest = {"temperature": tau, "vocab_valid": 9, "inplace_backward": False}
        out = logprob(x, target, torch.tensor([0, 2, 5]), backend=backend, **rest)
        return out.logp, out.entropy, out.sequence[:, 0], out.sequence[:, 2], out.lse

    assert torch.autograd.gradcheck(outputs, (c.logits.requires_grad_(),))


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
def test_gradcheck_of_the_head(backend, monkeypatch):
    """Over several chunks and blocks of rows, kept and made again."""
    chunked(monkeypatch, 4, 3)
    c = head_case(torch.float64, rows=5, vocab=11)
    c.target[1] = IGNORED
    rows = torch.tensor([0, 1, 3, 4])

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        options = {"rows": rows, "cu_seqlens": torch.tensor([0, 1, 1, 4]), "shard": Shard(0, 10, 10)}
        options |= {"temperature": torch.linspace(0.6, 1.7, 4), "logits_budget_bytes": 8 * 4 * 4, "backend": backend}
        out = lm_head_logprob(hidden, weight, c.target[rows].clamp(max=9), **options)
        return out.logp, out.entropy, out.sequence[:, 2], out.lse

    hidden, weight = (x[:, :3].clone().requires_grad_() for x in (c.hidden, c.weight))
    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("budget", [0, 1 << 20])
def test_the_head(budget, dtype, backend, monkeypatch):
    """An entropy bonus and a z-loss beside the log-probs."""
    chunked(monkeypatch, 100, 1000)
    c, grads = head_case(dtype), gradients(37, (1, 1, 1))
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    out = lm_head_logprob(hidden, weight, c.target, temperature=0.6, logits_budget_bytes=budget, backend=backend)
    torch.autograd.backward((out.logp, out.entropy, out.lse), grads)
    h, w = c.hidden.double().requires_grad_(), c.weight.double().requires_grad_()
    wanted = exact(h @ w.t(), c.target, 0.6)
    torch.autograd.backward(wanted, [g.double() for g in grads])
    assert (out.lse - wanted.lse).abs().max() < 1e-5
    for a, b in ((hidden.grad, h.grad), (weight.grad, w.grad)):
        assert ((a - b).abs() <= GRADIENT[dtype][0] * b.abs() + 5e-6 * b.abs().max()).all()


def test_shards_share_the_entropy(kernels: Kernels):
    """Each shard's part of the gradient needs the whole row's entropy, which every rank has after the gathering."""
    c, tau = case(6, 300), torch.full((1,), 1 / 0.6)
    grads = gradients(6, (1, 1, 1))
    shards = [(c.logits[:, i : i + 100].contiguous(), i) for i in (0, 100, 200)]
    stats = [kernels.logprob_stats(x, c.target, tau, i, 100, IGNORED, True) for x, i in shards]
    _, entropy, maximum, log_sum, _ = kernels.segment_reduce(
        torch.stack(stats), c.target, tau, torch.tensor([0, 6]), IGNORED
    )
    sloped = (grads[1] * entropy - grads[2], grads[1])
    for x, i in shards:
        kernels.logprob_backward_(x, c.target, grads[0], maximum, log_sum, tau, i, 100, IGNORED, *sloped)
    found = torch.cat([x for x, _ in shards], 1)
    assert excess(found, wanted_gradient(c, grads, 0.6), (0.0, 2e-6)) <= 1


def test_an_entropy_held_constant_would_be_seen():
    """-p log p differentiated with p held fixed, or without the entropy itself, is far off."""
    c, grads = case(8, 300), gradients(8, (0, 1, 0))
    wanted = wanted_gradient(c, grads)
    logps = torch.log_softmax(c.logits, -1)
    for wrong in (-logps.exp() * logps, -logps.exp() * (logps + 1)):
        assert excess(wrong * grads[1][:, None], wanted, (0.0, 2e-6)) > 1000
