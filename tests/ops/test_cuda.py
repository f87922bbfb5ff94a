"""csrc's CUDA kernels against log_softmax in float64 on the CPU; skipped where there is no GPU (tools/gpu_check.sh)."""

from __future__ import annotations

import pytest
import torch
from oracle import DTYPES, Case, Result, agrees, case, oracle, same_bits

from flowrl_mega.ops import lm_head_logprob, logprob, raise_if_flagged

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")

HALVES = ["fp32", "bf16", "fp16"]


def on_gpu(c: Case, temperature: float = 1.0, inplace: bool = True, **options) -> Result:
    logits = c.logits.cuda().requires_grad_()
    out = logprob(
        logits, c.target.cuda(), temperature=temperature, inplace_backward=inplace, backend="native", **options
    )
    out.logp.backward(c.grad.cuda())
    return Result(out.logp.detach().cpu(), out.entropy.cpu(), logits.grad.cpu())


# One column, around a warp's vectors, one block's chunk, the most threads, and real vocabularies.
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 255, 1024, 4104, 16385, 32000, 151936])
@pytest.mark.parametrize("dtype", HALVES)
def test_equals_log_softmax_in_float64(dtype, columns):
    for scale in (0.02, 3.0, 30.0):
        c = case(9, columns, DTYPES[dtype], scale)
        for temperature in (0.6, 1.0, 1.7):
            agrees(on_gpu(c, temperature), oracle(c.logits, c.target, temperature, c.grad))


@pytest.mark.parametrize("dtype", HALVES)
def test_in_place_and_out_of_place_give_the_same_bits_ten_times(dtype):
    """No atomics and a fixed order everywhere."""
    c = case(300, 5003, DTYPES[dtype])
    first = on_gpu(c)
    for run in range(10):
        assert all(same_bits(a, b) for a, b in zip(first, on_gpu(c, inplace=bool(run % 2)), strict=True))


def test_a_view_of_more_than_2_to_the_31_elements():
    """Offsets of rows need 64 bits: the last of these rows starts 17 GB after the first."""
    buffer = torch.empty(3, (1 << 32) + 64, dtype=torch.bfloat16, device="cuda")
    c = case(3, 1000, torch.bfloat16)
    buffer[:, :1000] = c.logits.cuda()
    out = logprob(buffer[:, :1000], c.target.cuda(), backend="native")
    wanted = oracle(c.logits, c.target)
    assert (out.logp.cpu().double() - wanted.logp).abs().max() < 1e-5


def test_ignored_rows_and_padded_columns_are_never_read():
    c = case(6, 300)
    c.logits[1], c.target[1] = torch.nan, -100
    c.logits[:, 250:] = torch.nan
    c.target[c.target >= 250] = 3
    found = on_gpu(c, vocab_valid=250)
    agrees(found, oracle(c.logits, c.target, grad=c.grad, valid=250))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_come_out(value):
    c = case(2, 4000)
    c.logits[0, 1234] = value
    found = on_gpu(c)
    assert found.logp[0].isnan() and found.entropy[0].isnan() and found.logp[1].isfinite()


def test_a_label_out_of_range_raises_the_flag():
    """Without a host sync in the hot path the call itself cannot complain."""
    c = case(4, 100)
    c.target[2] = 100
    logprob(c.logits.cuda(), c.target.cuda(), backend="native")
    with pytest.raises(ValueError, match="out of range"):
        raise_if_flagged()
    raise_if_flagged()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_lm_head(dtype, budget):
    """The whole head; bf16 operands give fp32 logits, and a bf16 gradient of them for the fast GEMM."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=g).to(DTYPES[dtype])
    weight = (torch.randn(5003, 64, generator=g) / 4).to(DTYPES[dtype])
    target, grad = torch.randint(5003, (200,), generator=g), torch.rand(200, generator=g)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(h64 @ w64.t(), -1).gather(1, target[:, None])[:, 0]
    logp.backward(grad.double())
    h, w = hidden.cuda().requires_grad_(), weight.cuda().requires_grad_()
    out = lm_head_logprob(h, w, target.cuda(), logits_budget_bytes=budget, backend="native")
    out.logp.backward(grad.cuda())
    near = 1e-5 if dtype == "fp32" else 2e-2
    for found, wanted in ((out.logp, logp), (h.grad, h64.grad), (w.grad, w64.grad)):
        assert (found.detach().cpu().double() - wanted).abs().max() < near * wanted.abs().max()


def test_a_cuda_graph_can_hold_the_ops():
    """No host sync and no allocation that a capture could not replay."""
    c = case(8, 2000)
    logits, target = c.logits.cuda(), c.target.cuda()
    one, cu = torch.ones(1, device="cuda"), torch.tensor([0, 3, 8], device="cuda")
    k = torch.ops.flowrl

    def both():
        stats = k.logprob_stats(logits, target, one, 0, 2000, -100, True)
        return k.segment_reduce(stats[None], target, one, cu, -100)

    wanted = [x.clone() for x in both()]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = both()
    graph.replay()
    torch.cuda.synchronize()
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
