"""Each warning has a run that brings it, and one much like it that does not."""

from __future__ import annotations

import pytest
from report_runs import metrics_of, report, write_run

CASES = {
    # what is said -> a run that is wrong, and one that is not
    "Updates were skipped (policy/skipped_updates): 3 in all, the first at step 7.": (
        {"policy__skipped_updates": lambda step: 3.0 if step == 7 else 0.0}, {"policy__skipped_updates": 0.0},
    ),
    "policy/entropy was NaN or infinite at 2 of 60 steps, first at step 9.": (
        {"policy__entropy": lambda step: None if step in (9, 10) else 1.0}, {"policy__entropy": 1.0},
    ),
    "mismatch/abs_logp_diff) is 0.06 over the last steps": (
        {"mismatch__abs_logp_diff": 0.06}, {"mismatch__abs_logp_diff": lambda step: 0.04 if step > 20 else 1.0},
    ),
    "policy/weight_sample_size is 0.25 over": (
        {"policy__weight_sample_size": 0.25}, {"policy__weight_sample_size": 0.35},
    ),
    "mismatch/effective_sample_size is 0.25 over": (
        {"mismatch__effective_sample_size": 0.25}, {"mismatch__effective_sample_size": 0.35},
    ),
    "60% of the last steps' answers were cut off": ({"rollout__stopped": 0.4}, {"rollout__stopped": 0.6}),
    "All answers to each prompt had the same reward": (
        {"reward__uniform_groups": 1.0}, {"reward__uniform_groups": 0.9},
    ),
    "The reward has not moved: reward/mean is 0.6 in": (
        {"reward__mean": lambda step: 0.4 + step % 5 / 10},
        {"reward__mean": lambda step: 0.4 + step % 5 / 10 + step / 60},
    ),
    "The reward fell: reward/mean is": (
        {"reward__mean": lambda step: -step / 60}, {"reward__mean": lambda step: step / 60},
    ),
    "The reward function failed on 60 answers": ({"reward__failed": 1}, {"reward__failed": 0}),
    "loss/log_z_gap is 2 over the last steps, more than the residual's standard deviation of 1.5": (
        {"loss__log_z_gap": 2.0, "loss__residual": 1.0, "loss__residual_sq": 3.25},
        {"loss__log_z_gap": 1.0, "loss__residual": 1.0, "loss__residual_sq": 3.25},
    ),
    "loss/log_z_gap is 2 over the last steps, more than the residual's standard deviation of 1.": (
        {"loss__log_z_gap": 2.0, "loss__residual_p05": -1.7, "loss__residual_p95": 1.7},
        {"loss__log_z_gap": 1.0, "loss__residual_p05": -1.7, "loss__residual_p95": 1.7},
    ),
    "policy/grad_norm was 2000 at step 8, more than 1000 times its median of 1.": (
        {"policy__grad_norm": lambda step: 2000.0 if step == 8 else 1.0},
        {"policy__grad_norm": lambda step: 900.0 if step == 8 else 1.0},
    ),
    "diversity/distinct_answers fell from 18.88 to 1.6,": (
        {"diversity__distinct_answers": lambda step: 20 - step * 0.32},
        {"diversity__distinct_answers": lambda step: 20 - step * 0.24},
    ),
    "Answers were up to 3 steps old (mismatch/max_staleness), beyond rollout.max_staleness = 2.": (
        {"mismatch__max_staleness": lambda step: 3 if step == 5 else 1}, {"mismatch__max_staleness": 2},
    ),
}  # fmt: skip


@pytest.mark.parametrize("said", CASES)
def test_a_warning_and_its_absence(tmp_path, said):
    wrong, right = CASES[said]
    found = report(write_run(tmp_path / "wrong", metrics_of(60, **wrong))).warnings()
    assert len(found) == 1 and said in found[0], found
    page = report(write_run(tmp_path / "right", metrics_of(60, **right)))
    assert page.warnings() == [] and "Nothing looks wrong." in page.section("warnings")


def test_runs_with_and_without(tmp_path):
    good = write_run(tmp_path / "good")
    bad = write_run(tmp_path / "bad", metrics_of(60, rollout__stopped=0.0), seed=1)
    page = report(good, bad)
    assert len(page.warnings()) == 1 and "Nothing looks wrong in good." in page.section("warnings")


def test_a_short_run_says_nothing_of_trends(tmp_path):
    page = report(write_run(tmp_path / "run", metrics_of(10, reward__mean=0.5)))
    assert page.warnings() == []


def test_many_metrics_without_numbers_are_counted(tmp_path):
    names = {f"kind__{at}__reward": None for at in range(20)}
    found = report(write_run(tmp_path / "run", metrics_of(60, **names))).warnings()
    assert len(found) == 9 and found[-1] == "12 more metrics were NaN or infinite at some step."
