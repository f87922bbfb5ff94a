"""Evaluation needs an engine, a grader and prompts, and no trainer: `flowrl-mega eval` has none."""

from __future__ import annotations

import pytest
from on_evaluate import by_a_run, without_a_trainer

SECTIONS = {
    "data": {"task": "sums", "task_args": {"lo": 10, "hi": 30}, "held_out": 0.2},
    "rollout": {"max_tokens": 8, "temperature": 0.8},
    "evaluation": {"samples": 4, "distinct_at": 8},
}
EXACT = {"pass_rate", "pass@8", "distinct", "coverage"}


@pytest.mark.ranks
@pytest.mark.parametrize("tp", [1, 2])
def test_the_figures_are_those_of_a_run(tp, tiny_model, ranks1, ranks2):
    """The same seed, prompts and weights: equal to the bit, sampled and exact figures alike."""
    pool, model = (ranks1, ranks2)[tp - 1], tiny_model("llama", vocab=15)
    run = pool.run(by_a_run, model, parallel={"tp": tp}, **SECTIONS)
    alone = pool.run(without_a_trainer, model, True, parallel={"tp": tp}, **SECTIONS)
    assert run == alone == [run[0]] * tp
    assert run[0].keys() > EXACT and 0 < run[0]["pass_rate"] < 1


@pytest.mark.ranks
def test_without_the_policy_itself_only_sampled_figures(tiny_model, ranks1):
    """A server's weights can be sampled but not scored by us."""
    (found,) = ranks1.run(without_a_trainer, tiny_model("llama", vocab=15), False, **SECTIONS)
    assert found.keys() == {"reward", "best@4", "right", "pass@4", "distinct_right@4"}
