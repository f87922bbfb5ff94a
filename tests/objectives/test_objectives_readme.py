"""The README's example of an objective of one's own is run as it stands there."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import on_ranks
import pytest
import torch

from flowrl_mega.objectives import REGISTRY, Objective, build

README = Path(__file__).parents[2] / "README.md"
IMPORTS = """
from typing import Literal
from pydantic import Field
from torch import Tensor
from flowrl_mega.metrics import Mean
from flowrl_mega.objectives import LossInputs, LossOutput, Objective
"""


def example() -> type[Objective]:
    (code,) = re.findall(r"```python\n(class Reinforce.*?)```", README.read_text(), flags=re.DOTALL)
    scope: dict[str, Any] = {"__name__": "reinforce"}
    exec(compile(IMPORTS + code, "README.md", "exec", dont_inherit=True), scope)
    return scope["Reinforce"]


def test_it_is_reinforce(packed, monkeypatch):
    """Against REINFORCE's gradient, -A for every token of an answer, and the registry's one line."""
    monkeypatch.setitem(REGISTRY, "reinforce", example())
    objective = build({"name": "reinforce", "scale": 2.0})
    s = packed()
    credit = objective.credit(s.credit, torch.zeros(5))
    r = s.credit.numpy()
    np.testing.assert_allclose(credit, 2 * (r - r.mean()))
    out = objective.loss(type(s)(s.logp, s.old_logp, None, None, s.cu_seqlens, credit))
    out.loss_sum.backward()
    np.testing.assert_allclose(s.logp.grad, -np.repeat(credit.numpy(), s.length.numpy()))
    assert out.count == 5


def train(path: Path) -> dict[str, float]:
    REGISTRY["reinforce"] = example()
    try:
        job = on_ranks.start(path, objective={"name": "reinforce"}, rollout={"prompts_per_step": 2, "max_tokens": 6})
        return job.trainer.step()[0]
    finally:
        del REGISTRY["reinforce"]


@pytest.mark.ranks
def test_the_trainer_takes_it(tiny_llama, ranks1):
    """A whole step: prompts, answers, rewards, update."""
    (metrics,) = ranks1.run(train, tiny_llama)
    assert np.isfinite(metrics["loss/policy"]) and metrics["policy/skipped_updates"] == 0
