"""csrc's CUDA kernels against log_softmax in float64: on a GPU where there is one (tools/gpu_check.sh), else emulated
on the CPU (cuda_emulation/), where memory ends at pages without access and a block's threads run in either order."""

from __future__ import annotations

import pytest
import torch
from cuda_emulation.memory import guarded
from oracle import DTYPES, GRADIENT, LOGP, Case, Result, agrees, case, excess, oracle, same_bits
from torch import Tensor

from flowrl_mega.ops import kernels as kernels_module
from flowrl_mega.ops import lm_head_logprob, logprob, raise_if_flagged

HALVES = ["fp32", "bf16", "fp16"]
EX2, ORDER = "CUDA_EMULATION_EX2", "CUDA_EMULATION_ORDER"
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs an NVIDIA GPU")
needs_emulation = pytest.mark.skipif(torch.cuda.is_available(), reason="runs the emulated kernels")


class Gpu:
    """The real one."""

    def empty(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return torch.empty(*sizes, dtype=dtype, device="cuda")

    def put(self, x: Tensor) -> Tensor:
        return x.cuda()


class Emulated:
    """CPU tensors."""

    def empty(self, *sizes: int, dtype: torch.dtype) -> Tensor:
        return guarded(*sizes, dtype=dtype)

    def put(self, x: Tensor) -> Tensor:
        return guarded(*x.shape, dtype=x.dtype).copy_(x)


@pytest.fixture
def gpu(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Gpu | Emulated:
    """Where the kernels run."""
    if torch.cuda.is_available():
        return Gpu()
    monkeypatch.setattr(kernels_module, "NATIVE", request.getfixturevalue("emulation").kernels)
    return Emulated()


def run(gpu: Gpu | Emulated, c: Case, temperature: float = 1.0, inplace: bool = True, **options) -> Result:
    logits = gpu.put(c.logits).requires_grad_()
    rest = {"temperature": temperature, "inplace_backward": inplace, "backend": "native", **options}
    out = logprob(logits, gpu.put(c.target), **rest)
    out.logp.backward(gpu.put(c.grad))
    return Result(out.logp.detach().cpu(), out.entropy.detach().cpu(), logits.grad.cpu())


# One column, around a warp's vectors, one block's chunk, the most threads, and real vocabularies.
@pytest.mark.parametrize("columns", [1, 7, 8, 33, 255, 1024, 4104, 16385, 32000, 151936])
@pytest.mark.parametrize("dtype", HALVES)
def test_equals_log_softmax_in_float64(dtype, columns, gpu):
    for scale in (0.02, 3.0, 30.0):
        c = case(9 if columns < 32000 else 3, columns, DTYPES[dtype], scale)
        for temperature in (0.6, 1.0, 1.7):
            agrees(run(gpu, c, temperature), oracle(c.logits, c.target, temperature, c.grad))


@pytest.mark.parametrize("dtype", HALVES)
def test_in_place_and_out_of_place_give_the_same_bits_ten_times(dtype, gpu):
    """No atomics and a fixed order everywhere."""
    c = case(300 if isinstance(gpu, Gpu) else 20, 5003, DTYPES[dtype])
    first = run(gpu, c)
    for n in range(10):
        assert all(same_bits(a, b) for a, b in zip(first, run(gpu, c, inplace=bool(n % 2)), strict=True))


@pytest.mark.parametrize("columns", [1, 9, 300, 5003])
@pytest.mark.parametrize("dtype", HALVES)
def test_where_a_row_lies_does_not_change_a_bit(dtype, columns, gpu):
    """Whatever its address is to a vector's 16 bytes or a word's 4: an odd vocabulary puts each row at another one."""
    c = case(3, columns, DTYPES[dtype])
    wanted = run(gpu, c._replace(logits=torch.nn.functional.pad(c.logits, (0, -columns % 8))), vocab_valid=columns)
    agrees(wanted._replace(gradient=wanted.gradient[:, :columns]), oracle(c.logits, c.target, grad=c.grad))
    for first in range(8):
        for apart in (columns, columns + 1, columns + 8 - columns % 8):
            flat = gpu.empty(first + 2 * apart + columns, dtype=DTYPES[dtype]).fill_(7.0)
            view = flat.as_strided((3, columns), (apart, 1), first)
            view.copy_(c.logits)
            out = logprob(view.requires_grad_(), gpu.put(c.target), backend="native")
            out.logp.backward(gpu.put(c.grad))
            assert same_bits(out.logp.cpu(), wanted.logp) and same_bits(out.entropy.cpu(), wanted.entropy)
            assert same_bits(view.detach().contiguous().cpu(), wanted.gradient[:, :columns].contiguous())
            view.detach().fill_(7.0)
            assert (flat == 7.0).all(), "what lies between the rows"


def test_a_view_of_more_than_2_to_the_31_elements(gpu):
    """Offsets of rows need 64 bits: the last of these rows starts 17 GB after the first."""
    buffer = gpu.empty(3, (1 << 32) + 64, dtype=torch.bfloat16)
    c = case(3, 1000, torch.bfloat16)
    view = buffer[:, :1000].copy_(c.logits)
    out = logprob(view.requires_grad_(), gpu.put(c.target), backend="native")
    out.logp.backward(gpu.put(c.grad))
    found = Result(out.logp.detach().cpu(), out.entropy.cpu(), view.detach().contiguous().cpu())
    agrees(found, oracle(c.logits, c.target, grad=c.grad))


def test_ignored_rows_and_padded_columns_are_never_read(gpu):
    c = case(6, 300)
    c.logits[1], c.target[1] = torch.nan, -100
    c.logits[:, 250:] = torch.nan
    c.target[c.target >= 250] = 3
    found = run(gpu, c, vocab_valid=250)
    agrees(found, oracle(c.logits, c.target, grad=c.grad, valid=250))


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_nan_and_infinity_come_out(value, gpu):
    c = case(2, 4000)
    c.logits[0, 1234] = value
    found = run(gpu, c)
    assert found.logp[0].isnan() and found.entropy[0].isnan() and found.logp[1].isfinite()


@needs_gpu
def test_a_label_out_of_range_raises_the_flag(gpu):
    """Without a host sync in the hot path the call itself cannot complain."""
    c = case(4, 100)
    c.target[2] = 100
    logprob(gpu.put(c.logits), gpu.put(c.target), backend="native")
    with pytest.raises(ValueError, match="out of range"):
        raise_if_flagged()
    raise_if_flagged()


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("budget", [0, 1 << 30])
def test_lm_head(dtype, budget, gpu):
    """The whole head; bf16 operands give fp32 logits, and a bf16 gradient of them for the fast GEMM."""
    g = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 64, generator=g).to(DTYPES[dtype])
    weight = (torch.randn(5003, 64, generator=g) / 4).to(DTYPES[dtype])
    target, grad = torch.randint(5003, (200,), generator=g), torch.rand(200, generator=g)
    h64, w64 = hidden.double().requires_grad_(), weight.double().requires_grad_()
    logp = torch.log_softmax(h64 @ w64.t(), -1).gather(1, target[:, None])[:, 0]
    logp.backward(grad.double())
    h, w = gpu.put(hidden).requires_grad_(), gpu.put(weight).requires_grad_()
    out = lm_head_logprob(h, w, gpu.put(target), logits_budget_bytes=budget, backend="native")
    out.logp.backward(gpu.put(grad))
    near = 1e-5 if dtype == "fp32" else 2e-2
    for found, wanted in ((out.logp, logp), (h.grad, h64.grad), (w.grad, w64.grad)):
        assert (found.detach().cpu().double() - wanted).abs().max() < near * wanted.abs().max()


@needs_gpu
def test_a_cuda_graph_can_hold_the_ops(gpu):
    """No host sync and no allocation that a capture could not replay."""
    c = case(8, 2000)
    logits, target = gpu.put(c.logits), gpu.put(c.target)
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


@needs_emulation
@pytest.mark.parametrize("error", ["-1", "1"])
@pytest.mark.parametrize("scale", [0.02, 3.0, 30.0])
def test_ex2_may_be_as_wrong_as_documented(scale, error, gpu, monkeypatch):
    """2^-22, everywhere and to one side, where a GPU's own errors are smaller and mixed."""
    monkeypatch.setenv(EX2, error)
    for dtype in HALVES:
        c = case(2, 152064, DTYPES[dtype], scale)
        agrees(run(gpu, c), oracle(c.logits, c.target, grad=c.grad))


@pytest.mark.parametrize("at", [-6.0, -12.0, -12.25, -18.5])
@pytest.mark.parametrize("dtype", HALVES)
def test_half_of_the_mass_far_below_the_maximum(dtype, at, gpu):
    """Where one rounding of d, the same in all of these columns, shows most in the entropy: 2.1e-6 was seen, of bf16
    (whose sums round d once more) and of fp16 alike. Half a step of such a logit is 0.03, or 0.004."""
    columns = min(int(torch.exp(torch.tensor(-at))), 250_000)
    logits = torch.full((1, columns + 1), at, dtype=DTYPES[dtype])
    logits[0, columns // 3] = 0.0
    c = Case(logits, torch.tensor([columns // 3]), torch.ones(1))
    found, wanted = run(gpu, c), oracle(c.logits, c.target, grad=c.grad)
    assert excess(found.entropy, wanted.entropy, (0.0, 3e-6)) <= 1
    assert excess(found.logp, wanted.logp, LOGP) <= 1


@needs_emulation
@pytest.mark.parametrize("columns", [300, 4104, 33000])
@pytest.mark.parametrize("dtype", HALVES)
def test_the_order_of_threads_does_not_change_a_bit(dtype, columns, gpu, monkeypatch):
    """Two threads at one place without a barrier between them would give other results the other way round."""
    c, cu_seqlens = case(9, columns, DTYPES[dtype]), torch.tensor([0, 2, 2, 9])
    found = []
    for order in ("forwards", "backwards"):
        monkeypatch.setenv(ORDER, order)
        sums = logprob(gpu.put(c.logits), gpu.put(c.target), gpu.put(cu_seqlens), backend="native").sequence
        found.append((*run(gpu, c), sums))
    assert all(same_bits(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("columns", [7, 1024, 4104, 16385])
@pytest.mark.parametrize("dtype", HALVES)
def test_entropy_and_the_log_of_the_sum_have_gradients(dtype, columns, gpu):
    """The backward kernel's other form, with a masked logit, which has p log p = 0, and rows that have none."""
    c = case(9, columns, DTYPES[dtype])
    d_entropy, d_lse = 2 * torch.rand(2, 9, generator=torch.Generator().manual_seed(1)) - 1
    c.logits[0, 0], c.target[0], c.target[4] = -torch.inf, 1, -100
    c.grad[5] = d_entropy[5] = d_lse[5] = 0.0
    logits = gpu.put(c.logits).requires_grad_()
    out = logprob(logits, gpu.put(c.target), temperature=0.6, backend="native")
    torch.autograd.backward((out.logp, out.entropy, out.lse), [gpu.put(g) for g in (c.grad, d_entropy, d_lse)])
    x = c.logits.double().requires_grad_()
    logps = torch.log_softmax(x / 0.6, -1)
    entropy = -(logps.exp() * logps.masked_fill(logps == -torch.inf, 0.0)).sum(-1)
    wanted = (logps.gather(1, c.target.clamp(0)[:, None])[:, 0], entropy, torch.logsumexp(x / 0.6, -1))
    torch.autograd.backward(wanted, [g.double() * (c.target >= 0) for g in (c.grad, d_entropy, d_lse)])
    relative, absolute = GRADIENT[DTYPES[dtype]]
    assert excess(logits.grad.cpu(), x.grad, (relative, max(absolute, 2e-6))) <= 1
