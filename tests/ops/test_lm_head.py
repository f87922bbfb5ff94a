"""lm_head_logprob against log_softmax in float64 of the whole product: values, gradients, and where they go."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import pytest
import torch
from oracle import IGNORED, OF_THE_CPU, same_bits
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from flowrl_mega.ops import HeadOutput, Shard, lm_head, lm_head_logprob

ROWS, HIDDEN, VOCAB = 37, 16, 530
TOLERANCE = 2e-6  # of the largest value: the GEMM's rounding on top of the ops'


class HeadCase(NamedTuple):
    hidden: Tensor  # [T, H]
    weight: Tensor  # [V, H]
    target: Tensor  # [T]
    grad: Tensor  # [T], of the loss with respect to each log-prob


class HeadResult(NamedTuple):
    logp: Tensor
    entropy: Tensor
    d_hidden: Tensor
    d_weight: Tensor


def head_case(dtype: torch.dtype = torch.float32, scale: float = 3.0, rows: int = ROWS, vocab: int = VOCAB) -> HeadCase:
    """Logits of a standard deviation of `scale`: neither flat nor one-hot."""
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(rows, HIDDEN, generator=g), torch.randn(vocab, HIDDEN, generator=g)
    target, grad = torch.randint(vocab, (rows,), generator=g), torch.randn(rows, generator=g)
    return HeadCase(hidden.to(dtype), (weight * scale / HIDDEN**0.5).to(dtype), target, grad)


def head_oracle(c: HeadCase, temperature: float = 1.0) -> HeadResult:
    """Ignored rows count nothing."""
    hidden, weight = c.hidden.double().requires_grad_(), c.weight.double().requires_grad_()
    logps = torch.log_softmax(hidden @ weight.t() / temperature, -1)
    read = c.target != IGNORED
    logp = torch.where(read, logps.gather(1, c.target.clamp(0)[:, None])[:, 0], 0.0)
    entropy = torch.where(read, -(logps.exp() * logps).sum(-1), 0.0)
    logp.backward(c.grad.double())
    return HeadResult(logp.detach(), entropy.detach(), hidden.grad, weight.grad)


def ours(c: HeadCase, temperature: float = 1.0, **options) -> HeadResult:
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    out = lm_head_logprob(hidden, weight, c.target, temperature=temperature, **options)
    out.logp.backward(c.grad.to(out.logp.dtype))
    return HeadResult(out.logp.detach(), out.entropy.detach(), hidden.grad, weight.grad)


def error(found: HeadResult, wanted: HeadResult) -> float:
    """The largest error of any of the four, in units of its largest value."""
    return max(((a - b).abs().max() / b.abs().max()).item() for a, b in zip(found, wanted, strict=True))


def all_same(a: HeadResult | HeadOutput, b: HeadResult | HeadOutput) -> bool:
    return all(same_bits(x, y) for x, y in zip(a, b, strict=True))


def chunked(monkeypatch: pytest.MonkeyPatch, tile: int, rows: int = ROWS) -> None:
    """Chunks of one tile, and of so many rows."""
    monkeypatch.setitem(lm_head._TILE, "cpu", tile)
    monkeypatch.setitem(lm_head._CHUNK_BYTES, "cpu", 4 * tile * rows)
    monkeypatch.setattr(lm_head, "_MOST_TILES", 1)


@pytest.mark.parametrize("temperature", [0.6, 1.0, 1.7])
@pytest.mark.parametrize("scale", [0.1, 3.0, 10.0])
def test_equals_log_softmax_in_float64(scale, temperature, backend):
    """The whole chain in float32: select, multiply, reduce, and back."""
    c = head_case(scale=scale)
    assert error(ours(c, temperature, backend=backend), head_oracle(c, temperature)) < TOLERANCE


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_hidden_states_and_weight(dtype, backend):
    """Halves are multiplied into float32 logits; a half logit of 16 to 32 has a step of up to 0.125."""
    c = head_case(dtype)
    found, wanted = ours(c, 0.6, backend=backend), head_oracle(c, 0.6)
    assert (found.logp - wanted.logp).abs().max() < 1e-5 and (found.entropy - wanted.entropy).abs().max() < 1e-5
    assert found.d_hidden.dtype == found.d_weight.dtype == dtype
    for a, b in zip(found[2:], wanted[2:], strict=True):  # one rounding at the end
        assert ((a - b).abs() <= torch.finfo(dtype).eps / 2 * b.abs() + 2e-6 * b.abs().max()).all()


def test_half_logits_would_be_seen():
    """The bound above has teeth."""
    c = head_case(torch.bfloat16)
    logps = torch.log_softmax((c.hidden @ c.weight.t()).float() / 0.6, -1).gather(1, c.target[:, None])[:, 0]
    assert (logps - head_oracle(c, 0.6).logp).abs().max() > 1e-2


@pytest.mark.parametrize("backend", OF_THE_CPU, indirect=True)
@pytest.mark.parametrize("through", ["rows", "sums", "both"])
def test_gradcheck(through, backend, monkeypatch):
    """Against finite differences in float64, over several chunks, kept and made again."""
    chunked(monkeypatch, tile=4, rows=3)
    c = head_case(torch.float64, rows=5, vocab=11)
    c.target[1] = IGNORED
    offsets, rows = torch.tensor([0, 1, 1, 4]), torch.tensor([0, 1, 3, 4])

    def outputs(hidden: Tensor, weight: Tensor) -> tuple[Tensor, ...]:
        options = {"rows": rows, "cu_seqlens": offsets, "temperature": 0.6, "shard": Shard(0, 10, 10)}
        target = c.target[rows].clamp(max=9)
        out = lm_head_logprob(hidden, weight, target, **options, logits_budget_bytes=8 * 4 * 4, backend=backend)
        return {"rows": (out.logp,), "sums": (out.sequence[:, 0],), "both": (out.logp, out.sequence[:, 0])}[through]

    hidden, weight = (x[:, :3].clone().requires_grad_() for x in (c.hidden, c.weight))
    assert torch.autograd.gradcheck(outputs, (hidden, weight))


@pytest.mark.parametrize("share", [0.05, 0.5, 1.0])
def test_only_the_selected_rows_are_computed(share, backend, monkeypatch):
    """A batch that is 95 % prompt pays for 5 % of the GEMM, and the others get no gradient."""
    shapes = []
    real = lm_head._logits
    monkeypatch.setattr(lm_head, "_logits", lambda h, w: shapes.append(len(h)) or real(h, w))
    c = head_case(rows=200)
    rows = torch.randperm(200, generator=torch.Generator().manual_seed(1))[: int(200 * share)]
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    out = lm_head_logprob(hidden, weight, c.target[rows], rows=rows, temperature=0.6, backend=backend)
    out.logp.backward(c.grad[rows])
    found = HeadResult(out.logp.detach(), out.entropy.detach(), hidden.grad, weight.grad)
    grad = torch.zeros(200).index_copy(0, rows, c.grad[rows])
    wanted = head_oracle(c._replace(grad=grad), 0.6)
    assert error(found, wanted._replace(logp=wanted.logp[rows], entropy=wanted.entropy[rows])) < TOLERANCE
    assert set(shapes) == {len(rows)}
    left_out = torch.ones(200, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(hidden.grad[left_out], torch.zeros_like(hidden.grad[left_out]))


def test_ignored_rows(backend):
    """They count nothing, anywhere."""
    c = head_case()
    c.target[::3] = IGNORED
    found = ours(c, 0.6, backend=backend)
    assert error(found, head_oracle(c, 0.6)) < TOLERANCE
    assert all(torch.equal(x[::3], torch.zeros_like(x[::3])) for x in found[:3])


@pytest.mark.parametrize(
    ("columns", "rows"),
    [(1, 1000), (3, 1000), (530, 1), (64, 1), (8, 12), (64, 36), (529, 36), (530, 1000), (1000, 12)],
)
def test_chunks_do_not_change_the_result(columns, rows, backend, monkeypatch):
    """A column at a time, a last chunk of one column, one chunk for all; a row at a time, a last block of one row."""
    c = head_case()
    chunked(monkeypatch, columns, rows)
    assert error(ours(c, 0.6, backend=backend), head_oracle(c, 0.6)) < TOLERANCE


@pytest.mark.parametrize("padding", [torch.nan, 1e4], ids=["nan", "huge"])
@pytest.mark.parametrize("columns", [64, 1000])
def test_padded_rows_of_the_weight_are_never_read(columns, padding, backend, monkeypatch):
    """Megatron pads the vocabulary for its ranks; what lies there may be anything, and its gradient is 0."""
    chunked(monkeypatch, columns)
    c = head_case()
    padded = c._replace(weight=torch.cat([c.weight, torch.full((110, HIDDEN), padding)]))
    wanted, found = (
        ours(c, 0.6, backend=backend),
        ours(padded, 0.6, backend=backend, shard=Shard(0, VOCAB, VOCAB)),
    )
    assert torch.equal(found.d_weight[VOCAB:], torch.zeros(110, HIDDEN))
    assert all_same(found._replace(d_weight=found.d_weight[:VOCAB]), wanted)


def test_the_weight_gradient_is_added_to_main_grad(backend):
    """Megatron's float32 buffer, over micro-batches; None comes back, or its hook would add the sum once more."""
    c = head_case()
    weight = c.weight.clone().requires_grad_()
    weight.main_grad = torch.full_like(c.weight, 0.25)
    for _ in range(2):
        lm_head_logprob(c.hidden, weight, c.target, temperature=0.6, backend=backend).logp.backward(c.grad)
    assert weight.grad is None
    wanted = 2 * head_oracle(c, 0.6).d_weight + 0.25
    assert (weight.main_grad - wanted).abs().max() < TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("main_grad", [True, False])
def test_no_gemm_of_no_rows(main_grad, backend, monkeypatch):
    """Of a context-parallel rank without a token of an answer; what CUDA's mm with an out_dtype makes of them is not
    known."""
    c = head_case()
    hidden, weight = c.hidden[:0].clone().requires_grad_(), c.weight.clone().requires_grad_()
    if main_grad:
        weight.main_grad = torch.full_like(c.weight, 0.25)
    for name in ("mm", "addmm"):
        monkeypatch.setattr(torch, name, None)
    lm_head_logprob(hidden, weight, c.target[:0], backend=backend).logp.backward(c.grad[:0])
    assert hidden.grad.shape == hidden.shape
    found, wanted = (weight.main_grad, 0.25) if main_grad else (weight.grad, 0.0)
    assert bool((found == wanted).all())


def test_megatrons_hook_is_told_that_a_gradient_is_added(backend):
    """It wants to see one all the same, to start the sum over ranks; of a tied embedding it takes autograd's."""
    c = head_case()
    for is_tied in (False, True):
        weight = c.weight.clone().requires_grad_()
        weight.main_grad, weight.grad_added_to_main_grad, weight.zero_out_wgrad = (
            torch.zeros_like(weight),
            False,
            is_tied,
        )
        lm_head_logprob(c.hidden, weight, c.target, backend=backend).logp.backward(c.grad)
        assert weight.grad_added_to_main_grad is not is_tied and (weight.grad is None) is is_tied
        assert (weight.main_grad - head_oracle(c).d_weight).abs().max() < 1e-3


def test_main_grad_is_float32_where_the_weight_is_not(backend):
    """A bf16 gradient over many micro-batches would lose what each one adds."""
    c = head_case(torch.bfloat16)
    weight = c.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros(c.weight.shape)
    lm_head_logprob(c.hidden, weight, c.target, backend=backend).logp.backward(c.grad)
    wanted = head_oracle(c).d_weight
    assert (weight.main_grad - wanted).abs().max() < 5 * TOLERANCE * wanted.abs().max()


@pytest.mark.parametrize("main_grad", [True, False])
def test_a_tied_weight_gets_both_gradients(main_grad, backend):
    """The embedding's own gradient comes through autograd: beside main_grad it stays alone in `grad`, for the hook."""
    c, ids = head_case(), torch.arange(ROWS) % 50
    weight = c.weight.clone().requires_grad_()
    if main_grad:
        weight.main_grad = torch.zeros_like(c.weight)
    hidden = weight[ids] + c.hidden
    lm_head_logprob(hidden, weight, c.target, backend=backend).logp.backward(c.grad)
    exact = c.weight.double().requires_grad_()
    logps = torch.log_softmax((exact[ids] + c.hidden) @ exact.t(), -1)
    logps.gather(1, c.target[:, None])[:, 0].backward(c.grad.double())
    both = weight.grad + (weight.main_grad if main_grad else 0.0)
    assert (both - exact.grad).abs().max() < TOLERANCE * exact.grad.abs().max()
    if main_grad:
        assert torch.equal(weight.grad[50:], torch.zeros_like(weight.grad[50:])), "only ids that were embedded"


@pytest.mark.parametrize("frozen", ["hidden", "weight"])
def test_what_is_frozen_gets_no_gradient(frozen, backend, monkeypatch):
    """Nor is its GEMM paid for."""
    products, real = [], lm_head._add_product
    monkeypatch.setattr(
        lm_head, "_add_product", lambda total, *args, **more: products.append(total.shape) or real(total, *args, **more)
    )
    c = head_case()
    hidden = c.hidden.clone().requires_grad_(frozen != "hidden")
    weight = c.weight.clone().requires_grad_(frozen != "weight")
    lm_head_logprob(hidden, weight, c.target, backend=backend).logp.backward(c.grad)
    wanted = head_oracle(c)
    assert products == [weight.shape if frozen == "hidden" else hidden.shape]
    assert (hidden.grad is None) == (frozen == "hidden") and (weight.grad is None) == (frozen == "weight")
    found, right = (weight.grad, wanted.d_weight) if frozen == "hidden" else (hidden.grad, wanted.d_hidden)
    assert (found - right).abs().max() < TOLERANCE * right.abs().max()


def test_no_rows(backend):
    """A micro-batch without a response token: zeros, and gradients of 0."""
    c = head_case()
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    none = torch.zeros(0, dtype=torch.long)
    out = lm_head_logprob(hidden, weight, none, rows=none, cu_seqlens=torch.tensor([0, 0, 0]), backend=backend)
    assert out.logp.shape == (0,) and torch.equal(out.sequence, torch.zeros(2, 3, dtype=torch.float64))
    (out.logp.sum() + out.sequence[:, 0].sum()).backward()
    assert torch.equal(hidden.grad, torch.zeros_like(hidden)) and torch.equal(weight.grad, torch.zeros_like(weight))


def test_scoring_and_training_give_the_same_bits(backend):
    """pi_old is scored without gradient: a difference in the last bit would be a weight w that is not 1."""
    c = head_case()
    trained = lm_head_logprob(c.hidden, c.weight.clone().requires_grad_(), c.target, backend=backend)
    with torch.no_grad():
        scored = lm_head_logprob(c.hidden, c.weight, c.target, backend=backend)
    assert all_same(scored, trained)


@pytest.mark.parametrize("rows", [1, 7, 50, 211])
@pytest.mark.parametrize("vocab", [530, 1009, 1024])
def test_every_row_of_logits_begins_at_16_bytes(rows, vocab, backend, monkeypatch):
    """On a GPU the GEMMs of unaligned rows take 3.5 times as long; both they and the kernels read rows 16 bytes at a
    time. Whatever the numbers of rows and of ids: most vocabularies are odd somewhere."""
    found = []
    chunked(monkeypatch, 256, rows)
    for name in ("_logits", "_d_logits"):
        real = getattr(lm_head, name)
        monkeypatch.setattr(lm_head, name, lambda *args, real=real: found.append(real(*args)) or found[-1])
    ours(head_case(rows=rows, vocab=vocab), backend=backend, logits_budget_bytes=0)
    assert len(found) == 3 * -(-vocab // 256)
    assert all(x.stride() == (-(-x.shape[1] // 8) * 8, 1) and x.data_ptr() % 16 == 0 for x in found)


def test_a_row_does_not_depend_on_how_many_others_there_are(backend, monkeypatch):
    """In another micro-batch pi_old would else have other bits than pi_theta. Of the head's own work: whether a GEMM
    gives a row the same bits among others is the library's affair, so there is none here."""
    monkeypatch.setitem(lm_head._TILE, "cpu", 64)
    monkeypatch.setitem(lm_head._CHUNK_BYTES, "cpu", 4 * 64 * 30)
    monkeypatch.setattr(lm_head, "_logits", lambda h, w: (h[:, None] * w).sum(-1))
    c = head_case(rows=300)
    whole = ours(c, 0.6, backend=backend)
    for count in (1, 7, 299):
        part = ours(HeadCase(c.hidden[:count], c.weight, c.target[:count], c.grad[:count]), 0.6, backend=backend)
        assert same_bits(part.logp, whole.logp[:count]) and same_bits(part.entropy, whole.entropy[:count])


@pytest.mark.parametrize("chunks", [1, 2, 19])
def test_a_chunk_costs_one_product_and_one_reading(chunks, native, monkeypatch):
    """What else there is does not grow with the chunks: on a GPU each op is a launch, once 475 for 19 chunks."""
    chunked(monkeypatch, 530 // chunks + 1)
    c = head_case()
    lm_head_logprob(c.hidden, c.weight, c.target)
    with Counted() as counted, torch.no_grad():
        lm_head_logprob(c.hidden, c.weight, c.target)
    per_chunk = {"aten.mm.out", "flowrl.logprob_stats.default"}
    assert all(counted.calls[name] == chunks for name in per_chunk)
    rest = {name for name in counted.calls if name not in per_chunk and name not in VIEWS}
    assert all(counted.calls[name] <= 4 for name in rest - {"aten.new_empty.default"}), counted.calls


VIEWS = {
    "aten.slice.Tensor",
    "aten.alias.default",
    "aten.t.default",
    "aten.transpose.int",
    "aten.view.default",
    "aten.detach.default",
}


class Counted(TorchDispatchMode):
    """Calls of every op, by name."""

    def __init__(self):
        super().__init__()
        self.calls = Counter()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.calls[str(op)] += 1
        return op(*args, **(kwargs or {}))
