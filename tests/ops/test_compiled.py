"""torch.compile(fullgraph=True) of both functions: the values and gradients that they have without it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from oracle import IGNORED, case, same_bits
from test_lm_head import head_case
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from flowrl_mega.ops import Shard, lm_head_logprob, logprob


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()


def gradients(function: Any, *inputs: Tensor | None) -> list[Tensor]:
    """What `function` gives, and the gradients of a weighted sum of all that."""
    leaves = [None if x is None else x.clone().requires_grad_() for x in inputs]
    out = function(*leaves)
    weights = [torch.linspace(-1, 1, x.numel(), dtype=x.dtype).view(x.shape) for x in out]
    sum((x * w).sum() for x, w in zip(out, weights, strict=True)).backward()
    return [*(x.detach() for x in out), *(x.grad for x in leaves if x is not None)]


def whole_graph(function: Any, backend: str = "aot_eager") -> Any:
    """aot_eager traces forward and backward as inductor does, and leaves out its C++."""
    return torch.compile(function, fullgraph=True, backend=backend)


@pytest.mark.parametrize("temperature", ["a number", "by row"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(12,), (3, 4)], ids=["rows", "batch"])
def test_logprob(shape, dtype, temperature, native):
    """All outputs, with neighbours that the compiler does look into."""
    c, offsets = case(12, 300, dtype), torch.tensor([0, 5, 5, 12])
    c.target[3] = IGNORED
    target = c.target.view(shape).int()
    tau = 0.6 if temperature == "a number" else torch.linspace(0.6, 1.7, 12).view(shape)

    def function(x: Tensor) -> tuple[Tensor, ...]:
        return tuple(logprob(x * 2, target, offsets, temperature=tau, inplace_backward=False))

    logits = c.logits.view(*shape, 300)
    wanted = gradients(function, logits)
    found = gradients(whole_graph(function), logits)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


@pytest.mark.parametrize("options", [{}, {"logit_scale": 2.0, "softcap": 5.0}, {"backend": "torch"}])
@pytest.mark.parametrize("inputs", ["hidden and weight", "and bias", "hidden alone"])
def test_lm_head(inputs, options, native):
    """With gradients of what has one."""
    c = head_case()
    bias = torch.randn(530, generator=torch.Generator().manual_seed(1))
    rows = torch.arange(0, 37, 2)
    leaves = {
        "hidden and weight": (c.hidden, c.weight),
        "and bias": (c.hidden, c.weight, bias),
        "hidden alone": (c.hidden,),
    }[inputs]

    def function(h: Tensor, w: Tensor = c.weight, b: Tensor | None = None) -> tuple[Tensor, ...]:
        rest = {"bias": b, "rows": rows, "temperature": 0.6, "logits_budget_bytes": 0}
        return tuple(lm_head_logprob(h.tanh(), w, c.target[rows], **rest, **options))

    wanted, found = gradients(function, *leaves), gradients(whole_graph(function), *leaves)
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_two_types(native):
    """bf16 hidden states of an fp32 weight; gradients in their own types."""
    c = head_case()

    def function(h: Tensor, w: Tensor) -> tuple[Tensor, ...]:
        return tuple(lm_head_logprob(h, w, c.target, shard=Shard(0, 530, 530)))

    leaves = (c.hidden.bfloat16(), c.weight)
    wanted, found = gradients(function, *leaves), gradients(whole_graph(function), *leaves)
    assert [x.dtype for x in found[-2:]] == [torch.bfloat16, torch.float32]
    assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))


def test_other_sizes_do_not_compile_for_ever(native):
    """A training run packs another number of rows into each micro-batch: the second one compiles for all of them."""

    def function(x: Tensor, h: Tensor, w: Tensor, t: Tensor) -> tuple[Tensor, ...]:
        return (*logprob(x, t), *lm_head_logprob(h, w, t, logits_budget_bytes=0))

    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for rows in (12, 7, 9, 31):
        c, h = case(rows, 300), head_case(rows=rows, vocab=300)
        found, wanted = (f(c.logits, h.hidden, h.weight, c.target) for f in (compiled, function))
        assert all(same_bits(a, b) for a, b in zip(found, wanted, strict=True))
    assert counter.frame_count == 2


@pytest.mark.parametrize("wrong", ["target", "offset"])
def test_wrong_values_are_told_when_it_runs(wrong, native):
    """The trace does not know them."""
    c, offsets = case(6, 50), torch.tensor([0, 6])
    compiled = whole_graph(lambda x, t, o: tuple(logprob(x, t, o)))
    if wrong == "target":
        c.target[2] = 50
    else:
        offsets[1] = 5
    with pytest.raises(ValueError, match=r"target\[2\] = 50" if wrong == "target" else "rise from 0 to 6"):
        compiled(c.logits, c.target, offsets)


def test_scoring(native):
    """Without gradient, as a reference model is run."""
    c = case(6, 50)
    with torch.no_grad():
        found = whole_graph(lambda x: tuple(logprob(x, c.target)))(c.logits)
    assert all(same_bits(a, b) for a, b in zip(found, logprob(c.logits, c.target), strict=True))
