"""pi_old is scored by the trainer with the update's own micro-batch plan, so that w is exactly 1 where it must be."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import on_ranks
import pytest
from on_ranks import step_by_updates

from flowrl_mega.config import RolloutSettings
from flowrl_mega.objectives import FlowRL

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
def test_of_a_single_prompt_the_gap_is_the_mean_residual(tiny_model, ranks2):
    """Its answers lie in several micro-batches of two replicas: log Z less what all of them estimate together."""
    sections = SECTIONS | {"rollout": SECTIONS["rollout"] | {"prompts_per_step": 1, "group_size": 16}}
    batch, model = {"tokens_per_microbatch": 40}, tiny_model("llama", vocab=14)
    for (update,) in ranks2.run(step_by_updates, model, parallel={"dp": 2}, batch=batch, **sections):
        assert update["loss/log_z_gap"] == pytest.approx(abs(update["loss/residual"]), rel=1e-9)


@pytest.mark.ranks
def test_one_update_a_step_is_on_policy_at_every_step(tiny_model, ranks1):
    """Then pi_old is the update's own forward, and no scoring pass is paid for it."""
    (updates,) = ranks1.run(step_by_updates, tiny_model("llama", vocab=14), steps=3, **SECTIONS)
    assert len(updates) == 3
    assert all(u["policy/max_abs_log_ratio"] == 0.0 and u["loss/flow_weight"] == 1.0 for u in updates)
    assert abs(updates[2]["policy/mean_log_ratio_to_ref"]) > 1e-3, "while the policy leaves the reference"


def by_prompt(row: dict[str, Any], response: str) -> float:
    """The same for every answer to a prompt."""
    return row["total"] / 100


def first_step(path: Any, folder: Path, **sections: Any) -> list[dict[str, Any]]:
    """The metrics of a whole run of one step."""
    on_ranks.start(path, run_dir=str(folder), **sections).run()
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.ranks
def test_a_frozen_log_z_is_that_of_the_answers_own_prompt(tiny_model, tmp_path, ranks2):
    """Of equal rewards r it is beta r, and pi_theta = pi_ref before the first update: every residual is exactly 0, if
    each answer in every micro-batch of both replicas has got its own prompt's, some of which are held out."""
    objective = {"name": "flowrl", "beta": 2.0, "z": "frozen", "z_answers": 3, "reward_norm": "none"}
    sections = SECTIONS | {
        "objective": objective,
        "reward": f"{__name__}:by_prompt",
        "data": {"task": "sums", "task_args": {"lo": 60}, "held_out": 0.25},
        "batch": {"tokens_per_microbatch": 40},
        "monitor": {"progress": False},
    }
    model = tiny_model("llama", vocab=14)
    rows, _ = ranks2.run(first_step, model, tmp_path, parallel={"dp": 2}, **sections)
    assert len(rows) == 1 and rows[0]["loss/residual_sq"] == rows[0]["loss/log_z_gap"] == 0.0
    assert rows[0]["loss/log_z"] == pytest.approx(2.0 * rows[0]["reward/mean"]) and rows[0]["loss/log_z"] > 1


LAG = 0.03  # nats a token


def steps_of_a_lagging_engine(path: Any, **sections: Any) -> tuple[list[dict[str, float]], list[int]]:
    """As `step_by_updates`, of an engine whose weights gave each token e^-LAG of the probability that the trainer gives
    it; and the lengths of the answers."""
    real, lengths = on_ranks.start, []

    def start(*args: Any, **kwargs: Any) -> Any:
        run = real(*args, **kwargs)
        finish = run.engine.finish

        def lagging(job: Any) -> Any:
            groups = finish(job)
            for rollout in (r for group in groups for r in group):
                rollout.logp[:] = [logp - LAG for logp in rollout.logp]
                lengths.append(len(rollout.response))
            return groups

        run.engine.finish = lagging
        return run

    on_ranks.start = start
    try:
        return step_by_updates(path, **sections), lengths
    finally:
        on_ranks.start = real


@pytest.mark.ranks
@pytest.mark.parametrize(
    ("old", "tis", "ahead_of"),
    [("trainer", "none", 0), ("behaviour", "none", 1), ("decoupled", "sum", 0), (None, "none", 0)],
)
def test_what_a_ratio_is_against(old, tis, ahead_of, tiny_model, ranks1):
    """Scored again with the current weights, every ratio is 1 however old the answers are; against the policy that
    wrote them it is e^(LAG |y|); decoupled, that is the weight beside a ratio of 1."""
    objective = {"name": "flowrl", "beta": 2.0, "weight": "released", "tis": tis} | ({"old": old} if old else {})
    sections = SECTIONS | {"objective": objective}
    ((updates, lengths),) = ranks1.run(steps_of_a_lagging_engine, tiny_model("llama", vocab=14), **sections)
    (update,) = updates
    ratios = [math.exp(LAG * length) for length in lengths]
    assert len(set(lengths)) > 2
    assert update["policy/max_abs_log_ratio"] == pytest.approx(ahead_of * LAG * max(lengths), abs=1e-4)
    mean = sum(ratios) / len(ratios)
    assert update["loss/flow_weight"] == pytest.approx(mean if ahead_of else 1.0, rel=1e-4)
    assert update["mismatch/abs_logp_diff"] == pytest.approx(LAG, rel=1e-3), "which is measured in any case"
    if tis == "sum":
        assert update["mismatch/tis_weight"] == pytest.approx(mean, rel=1e-4)


@pytest.mark.parametrize(
    ("rollout", "tis", "behaviour"),
    [({}, "none", False), ({"engine": "sglang", "ahead": 1}, "none", True), ({"drop_uniform": True}, "none", True),
     ({"engine": "sglang", "ahead": 1}, "sum", False)],
)  # fmt: skip
def test_stale_answers_are_held_against_who_wrote_them(rollout, tis, behaviour):
    """Unless somebody has said otherwise: with one update a step the trainer's own ratio would correct for nothing."""
    objective = FlowRL(tis=tis)
    assert objective.is_old_behaviour(RolloutSettings(**rollout).writes_ahead) == behaviour
