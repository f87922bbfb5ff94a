"""model.logits_budget_mb: how much the policy's head may keep, and what `auto` makes of a GPU's memory.

The memory is invented here, by rank, or what a stub of torch.cuda says: there is no GPU. That a budget changes no bit,
and what is held under one, is in tests/ops/test_memory.py.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from on_logits_budget import budgets

from flowrl_mega.config import ConfigError, ModelSettings
from flowrl_mega.model.logits_budget import LogitsBudget, Memory
from flowrl_mega.settings import validated

GB = 1 << 30
USUAL = 256 << 20


@pytest.mark.ranks
def test_half_of_what_the_second_update_leaves_on_the_fullest_rank(tiny_model, ranks2):
    """Both ranks come to one number, at that update and never again."""
    memories = [Memory(40 * GB, reserved=60 * GB, peak=50 * GB), Memory(10 * GB, reserved=60 * GB, peak=55 * GB)]
    found = ranks2.run(budgets, tiny_model("llama", vocab=14), memories)
    assert found == [[USUAL, USUAL, *[USUAL + 15 * GB // 2] * 3]] * 2


@pytest.mark.ranks
@pytest.mark.parametrize(("setting", "expected"), [(3, 3 << 20), ("auto", USUAL)])
def test_a_number_is_kept_to(setting, expected, tiny_model, ranks1):
    """And so is the usual one by a rank without a GPU."""
    assert ranks1.run(budgets, tiny_model("llama", vocab=14), None, setting) == [[expected] * 5]


def policy_on(device: str) -> Any:
    return SimpleNamespace(layout=SimpleNamespace(device=torch.device(device), rank=0), logits_budget_bytes=USUAL)


def test_what_is_read_of_a_gpu(monkeypatch):
    """What the allocator holds in reserve is free to it as well; the peak is of what was in use."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda: (7 * GB, 80 * GB))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda: 60 * GB)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 50 * GB)
    memory = LogitsBudget(policy_on("cuda"), "auto").memory
    assert memory is not None
    assert memory().spare == 17 * GB
    assert Memory(free=0, reserved=1, peak=2).spare == 0
    assert LogitsBudget(policy_on("cuda"), 256).memory is None
    assert LogitsBudget(policy_on("cpu"), "auto").memory is None


@pytest.mark.parametrize("value", [0, -1, "full", "Auto", 1.5])
def test_neither_a_number_nor_auto(value):
    with pytest.raises(ConfigError, match=r"model\.logits_budget_mb = "):
        validated(ModelSettings, {"path": "somewhere", "logits_budget_mb": value}, "model")
