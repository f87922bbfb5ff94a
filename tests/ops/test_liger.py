"""ops.backend = liger: what Liger-Kernel gets and what is made of its answer; a stand-in, and it where installed."""

from __future__ import annotations

import sys

import pytest
import torch
from on_liger import stand_in
from oracle import IGNORED
from test_lm_head import TOLERANCE, VOCAB, HeadResult, error, head_case, head_oracle, ours

from flowrl_mega.ops import BuildError, Shard, describe, lm_head_logprob

CPU = torch.device("cpu")


@pytest.fixture(params=["stand-in", "installed"])
def liger(request, monkeypatch):
    if request.param == "installed":
        pytest.importorskip("liger_kernel.ops", reason="Liger-Kernel is not installed (it needs Triton)")
        return
    for name, module in stand_in().items():
        monkeypatch.setitem(sys.modules, name, module)


def test_where_it_is_not_installed(monkeypatch):
    """One message, which says what to install; never a fall-back that nobody asked for."""
    monkeypatch.setitem(sys.modules, "liger_kernel", None)
    c = head_case()
    for ask in (lambda: describe("liger", CPU), lambda: lm_head_logprob(*c[:3], backend="liger")):
        with pytest.raises(BuildError, match="liger_kernel.*pip install.*ops.backend=auto"):
            ask()


def test_it_gives_what_the_others_do(liger):
    """Signs, ignored rows, padding, temperature."""
    c = head_case()
    c.target[3] = IGNORED
    padded = c._replace(weight=torch.cat([c.weight, torch.full((10, c.weight.shape[1]), torch.nan)]))
    found = ours(padded, 0.6, backend="liger", shard=Shard(0, VOCAB, VOCAB))
    assert error(HeadResult(*found[:3], found.d_weight[:VOCAB]), head_oracle(c, 0.6)) < TOLERANCE


def test_its_sums_carry_gradients(liger):
    """The sums over sequences are ours, on top of its rows."""
    c, weights = head_case(), torch.tensor([0.5, 3.0, -1.0])
    c.target[3] = IGNORED
    offsets = torch.tensor([0, 5, 5, 37])
    found, wanted = [], []
    for backend, kept in (("liger", found), ("torch", wanted)):
        hidden = c.hidden.clone().requires_grad_()
        out = lm_head_logprob(hidden, c.weight, c.target, cu_seqlens=offsets, backend=backend)
        (out.sequence[:, 0] * weights).sum().backward()
        kept += [*out[:3], hidden.grad]  # it has no log of the sum
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == b.dtype and (a - b).abs().max() < 1e-5 * b.abs().max()
