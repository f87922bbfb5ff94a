"""pi_old is scored by the trainer with the update's own micro-batch plan, so that w is exactly 1 where it must be."""

from __future__ import annotations

import pytest
from on_ranks import step_by_updates

LAYOUTS = {"tp1": {}, "tp2": {"tp": 2}, "tp2+sp": {"tp": 2, "sequence_parallel": True}, "dp2": {"dp": 2}}
SECTIONS = {
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 12, "temperature": 0.8},
    "objective": {"name": "flowrl", "beta": 2.0},
    "optimizer": {"lr": 1e-2, "warmup_steps": 0},
}


@pytest.mark.ranks
@pytest.mark.parametrize("layout", LAYOUTS)
def test_w_is_1_on_the_first_mini_batch(layout, tiny_model, ranks1, ranks2):
    """At |y| = 8192 a drift of 2e-5 nat a token is a factor of 1.2 in w; equal plans make the drift exactly 0."""
    pool = ranks1 if layout == "tp1" else ranks2
    batch = {"mini_batch": 8, "tokens_per_microbatch": 40}
    model = tiny_model("llama", vocab=14)
    for first, second in pool.run(step_by_updates, model, parallel=LAYOUTS[layout], batch=batch, **SECTIONS):
        assert first["policy/max_abs_log_ratio"] == 0.0
        assert first["loss/flow_weight"] == 1.0
        assert first["policy/mean_log_ratio_to_ref"] == 0.0, "reference and policy start with the same weights"
        assert second["policy/max_abs_log_ratio"] > 1e-3, "the first update moved the policy away from pi_old"
        assert second["loss/flow_weight"] != 1.0


@pytest.mark.ranks
def test_one_update_a_step_is_on_policy_at_every_step(tiny_model, ranks1):
    """Then pi_old is the update's own forward, and no scoring pass is paid for it."""
    (updates,) = ranks1.run(step_by_updates, tiny_model("llama", vocab=14), steps=3, **SECTIONS)
    assert len(updates) == 3
    assert all(u["policy/max_abs_log_ratio"] == 0.0 and u["loss/flow_weight"] == 1.0 for u in updates)
    assert abs(updates[2]["policy/mean_log_ratio_to_ref"]) > 1e-3, "while the policy leaves the reference"
