"""Nothing of the size rows x vocabulary that nobody asked for: budgets of the lm-head, and logprob in place."""

from __future__ import annotations

import pytest
import torch
from memory import allocated
from oracle import case
from test_lm_head import HIDDEN, all_same, chunked, head_case, ours

from flowrl_mega.ops import lm_head, lm_head_logprob, logprob

ROWS, WIDTH, CHUNKS = 37, 64, 9  # 530 columns
CHUNK, ALL = 4 * ROWS * WIDTH, 4 * ROWS * 530  # bytes of one chunk's logits, and of all


@pytest.fixture(autouse=True)
def chunks(monkeypatch):
    chunked(monkeypatch, WIDTH)


@pytest.mark.parametrize(
    ("budget", "kept"),
    [(0, 0), (1, 0), (CHUNK - 1, 0), (CHUNK, 1), (4 * CHUNK, 4)]
    + [(ALL - CHUNK - 1, 7), (ALL - CHUNK, 9), (ALL, 9), (1 << 40, 9)],
)
def test_the_budget_says_how_many_chunks_are_kept(budget, kept, backend, monkeypatch):
    """The rest is multiplied again, to the same bits: the budget is a matter of memory and time alone. Where only one
    chunk is beyond it, making that again would hold as much as keeping it."""
    made = []
    real = lm_head._logits
    c = head_case()
    wanted = ours(c, 0.6, backend=backend)
    monkeypatch.setattr(lm_head, "_logits", lambda *args: made.append(1) or real(*args))
    found = ours(c, 0.6, backend=backend, logits_budget_bytes=budget)
    assert len(made) == CHUNKS + CHUNKS - kept
    assert all_same(found, wanted)


def test_a_second_backward_makes_the_kept_logits_again(backend, monkeypatch):
    """The first one has written its gradient over them."""
    made = []
    real = lm_head._logits
    monkeypatch.setattr(lm_head, "_logits", lambda *args: made.append(1) or real(*args))
    c = head_case()
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    out = lm_head_logprob(hidden, weight, c.target, backend=backend)
    first, second = (torch.autograd.grad(out.logp, (hidden, weight), c.grad, retain_graph=True) for _ in range(2))
    assert len(made) == 2 * CHUNKS
    assert all(torch.equal(x, y) for x, y in zip(first, second, strict=True))


@pytest.mark.parametrize("how", ["no_grad", "inference_mode", "nothing requires a gradient"])
def test_without_gradient_only_one_chunk_exists(how, backend, monkeypatch):
    """Reference and old policy are scored over the whole vocabulary: 10.8 GB of logits in one report."""
    rows, vocab, width = 64, 8192, 512
    chunked(monkeypatch, width, rows)
    chunk = 4 * rows * width
    c = head_case(rows=rows, vocab=vocab)
    mode = {"no_grad": torch.no_grad, "inference_mode": torch.inference_mode}.get(how, torch.enable_grad)
    with mode():
        used = allocated(lambda: lm_head_logprob(c.hidden, c.weight, c.target, backend=backend))
    assert used.largest == chunk
    temporaries = 1 if backend == "native" else 6  # plain torch has x, d, e, d e and a mask beside the logits
    assert used.peak <= temporaries * chunk + 0.04 * 4 * rows * vocab, "of the chunks before, four numbers a row"


@pytest.mark.parametrize("budget", [0, 5 * CHUNK, ALL - CHUNK])
def test_training_holds_no_more_than_its_budget(budget, native):
    """Beyond it: the chunk at work, the gradients of hidden states and weight, and numbers by the row."""
    c = head_case()
    hidden, weight = c.hidden.clone().requires_grad_(), c.weight.clone().requires_grad_()
    weight.main_grad = torch.zeros_like(c.weight)

    def step() -> None:
        lm_head_logprob(hidden, weight, c.target, logits_budget_bytes=budget).logp.backward(c.grad)

    step()
    gradients = 2 * 4 * ROWS * HIDDEN
    by_the_row = 100 * 8 * ROWS * CHUNKS
    assert allocated(step).peak <= budget + CHUNK + gradients + by_the_row


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_logprob_in_place_needs_no_second_matrix(dtype, native):
    """Forward and backward; the bound is 0.15 of the logits, eager torch takes 3.15 of them."""
    c = case(64, 4096, dtype)
    logits = c.logits.clone().requires_grad_()
    used = allocated(lambda: logprob(logits, c.target, backend=native).logp.backward(c.grad))
    assert used.peak < 0.15 * logits.numel() * logits.element_size()


def test_the_measure_sees_a_matrix():
    """A profiler that saw nothing would let all of this pass."""
    c = case(64, 4096)
    used = allocated(lambda: torch.log_softmax(c.logits, -1))
    assert used.largest == used.peak == 4 * 64 * 4096
