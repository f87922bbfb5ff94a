"""Tensor-parallel ranks each have a copy of log Z's network: they stay the same, whatever order a GPU sums in."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from on_copies import trained
from rank_pool import RankPool
from test_layouts import COMMON, STEPS
from tiny_models import make

pytestmark = pytest.mark.ranks


@pytest.mark.parametrize("averaged", [True, False], ids=["", "without the average"])
def test_copies_stay_the_same(averaged: bool, tmp_path: Path, ranks2: RankPool) -> None:
    """And without it they drift apart, so that this test would see it."""
    case = COMMON | {"parallel": {"tp": 2}, "batch": {"mini_batch": 6}}
    first, second = ranks2.run(trained, make("llama", tmp_path), STEPS[:1], case, averaged)
    assert first.keys() == second.keys() and len(first) == 10
    unlike = [name for name, weight in first.items() if not torch.equal(weight, second[name])]
    assert not unlike if averaged else len(unlike) > 5
    assert all((first[name] - second[name]).abs().max() < 1e-3 for name in unlike)
