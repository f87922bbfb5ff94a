"""Objectives from outside the package: docs/objectives.md's example as it stands there, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch
from jobs import Job, records, write_config

from flowrl_mega.config import ConfigError
from flowrl_mega.objectives import Objective, build

PAGE = Path(__file__).parents[2] / "docs" / "objectives.md"

WITH_LOG_Z = """
from __future__ import annotations
from typing import Literal
from flowrl_mega.objectives import FlowRL

class Softer(FlowRL):
    '''Takes all that a built-in one takes: a reference, a partition function, and a field that checkpoints keep.'''
    name: Literal["softer"] = "softer"
    beta: float = 3.0

    @property
    def adapts(self):
        return ("beta",)

    def adapted(self, metrics, sequences):
        return self.model_copy(update={"beta": self.beta / 2})
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current directory, with the page's reinforce.py in it."""
    (code,) = re.findall(r"```python\n([^`]*?class Reinforce.*?)```", PAGE.read_text(), flags=re.DOTALL)
    (tmp_path / "reinforce.py").write_text(code)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_it_is_reinforce(folder, packed):
    """Against REINFORCE's gradient, -A for every token of an answer."""
    objective = build({"name": "reinforce.py:Reinforce", "scale": 2.0})
    assert objective.name == "reinforce.py:Reinforce", "messages call it what the user calls it"
    s = packed()
    credit = objective.credit(s.credit, torch.zeros(5))
    r = s.credit.numpy()
    np.testing.assert_allclose(credit, 2 * (r - r.mean()))
    out = objective.loss(type(s)(s.logp, s.old_logp, None, None, s.cu_seqlens, credit))
    out.loss_sum.backward()
    np.testing.assert_allclose(s.logp.grad, -np.repeat(credit.numpy(), s.length.numpy()))
    assert out.count == 5


def test_an_installed_module_and_a_name_of_its_own(folder):
    assert build({"name": "flowrl_mega.objectives.grpo:GRPO", "std": False}).name == "grpo"


def test_it_is_the_same_class_each_time(folder):
    """The check before the run, the plan and the run each build it."""
    assert build({"name": "reinforce.py:Reinforce"}) == build({"name": "reinforce.py:Reinforce"})


@pytest.mark.parametrize(
    ("section", "words"),
    [
        ({"name": "nowhere.py:Reinforce"}, ["objective.name = 'nowhere.py:Reinforce'", "cannot import 'nowhere.py'"]),
        ({"name": "reinforce.py:Reinforced"}, ["objective.name", "did you mean 'Reinforce'?"]),
        ({"name": "reinforce.py:Field"}, ["objective.name = 'reinforce.py:Field'", "a subclass of", "Objective"]),
        ({"name": "reinforce.py:Tensor"}, ["objective.name = 'reinforce.py:Tensor'", "a subclass of", "Objective"]),
        ({"name": "reinforce.py:Objective"}, ["Objective does not define credit and loss"]),
        ({"name": "reinforce.py:Reinforce", "scal": 2}, ["objective.scal: no such setting; did you mean 'scale'?"]),
        ({"name": "reinforce.py:Reinforce", "scale": 0}, ["objective.scale = 0", "greater than 0"]),
        ({"name": "reinforce.py:Reinforce", "tis_cap": 3}, ["objective.tis_cap = 3.0", "objective.tis"]),
    ],
)
def test_what_is_refused(folder, section, words):
    with pytest.raises(ConfigError) as error:
        build(section)
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.ranks
def test_the_command_line_trains_with_it(folder, tiny_llama):
    """Two ranks, each of which finds the file from the current directory; two steps, by the path as the page has it."""
    sizes = {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": 6}, "optimizer": {"lr": 1e-3}}
    path = write_config(folder, tiny_llama, steps=2, checkpoint={"at_end": False}, **sizes)
    override = "--objective={name: reinforce.py:Reinforce, scale: 2}"
    Job(["train", str(path), override], folder / "log", world=2, cwd=folder).run()
    assert [record["step"] for record in records(folder / "run", "metrics")] == [1, 2]


@pytest.mark.ranks
def test_a_checkpoint_keeps_its_fields_and_its_partition_function(folder, tiny_llama):
    """beta is halved after each step; the run that goes on has it where the first one left it, and the same log Z."""
    (folder / "softer.py").write_text(WITH_LOG_Z)
    small = {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": 6}, "parallel": {"tp": 1}}
    path = write_config(
        folder, tiny_llama, steps=3, objective={"name": "softer.py:Softer"}, evaluation={"every": 0}, **small
    )
    assert issubclass(type(build({"name": "softer.py:Softer"})), Objective)
    Job(["train", str(path), "--run_dir=whole"], folder / "log", world=1, cwd=folder).run()
    Job(["train", str(path), "--run_dir=parts", "--steps=2"], folder / "log", world=1, cwd=folder).run()
    Job(["train", str(path), "--run_dir=parts"], folder / "log", world=1, cwd=folder).run()
    assert records(folder / "parts", "metrics") == records(folder / "whole", "metrics")
