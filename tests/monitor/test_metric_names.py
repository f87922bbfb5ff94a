"""Metrics have names in groups, and run folders of earlier versions are read under them."""

from __future__ import annotations

import json

from flowrl_mega.monitor import Monitor
from flowrl_mega.monitor.metric_names import RENAMED, is_measured, renamed
from flowrl_mega.monitor.run_folder import EVALUATION, METRICS, SAMPLES, RunFolder


def test_the_table_is_sound():
    """Each new name stands for one old name and is none itself, so that reading twice changes nothing."""
    assert len(set(RENAMED.values())) == len(RENAMED)
    assert not set(RENAMED.values()) & set(RENAMED)
    assert all(name.count("/") == 1 for name in RENAMED.values()), "a group and a name"
    line = {"step": 3, **{name: i for i, name in enumerate(RENAMED)}, "rollout/rounds": 1.0, "mine": 2.0}
    assert list(renamed(line)) == ["step", *RENAMED.values(), "rollout/rounds", "mine"]
    assert renamed(renamed(line)) == renamed(line)


def test_what_the_machine_decides():
    """Times, rates and memory differ between equal runs; what was packed and sent does not."""
    assert {old for old, new in RENAMED.items() if is_measured(new)} == {
        *(f"seconds/{phase}" for phase in ("generate", "reward", "score", "update", "sync", "step")),
        "tokens_per_second", "generated_tokens_per_second", "memory_gb", "sync_seconds",
    }  # fmt: skip


def test_only_metrics_are_renamed(tmp_path):
    """Evaluations and samples have a "reward", too, and keep it."""
    folder = RunFolder(tmp_path)
    folder.log(1, {"reward": 0.5, "loss": 0.1 + 0.2})
    folder.evaluation(1, {"reward": 0.5})
    folder.samples(1, [{"reward": 0.5}])
    assert folder.read(METRICS) == [{"step": 1, "reward/mean": 0.5, "loss/policy": 0.1 + 0.2}]
    assert folder.read(EVALUATION) == folder.read(SAMPLES) == [{"step": 1, "reward": 0.5}]


def test_a_run_of_an_earlier_version_goes_on_under_one_name(tmp_path):
    """Half a file of old names would be two curves of one metric, to every reader of the file itself."""
    folder = RunFolder(tmp_path)
    for step in (1, 2, 3):
        folder.log(step, {"reward": 1 / step, "seconds/step": 1.0, "rollout/rounds": 1.0})
    monitor = Monitor(tmp_path, {}, total_steps=4, resume_step=2, progress=False)
    monitor.log(3, {"reward/mean": 1 / 3, "perf/step_seconds": 1.0, "rollout/rounds": 1.0})
    monitor.close()
    lines = [json.loads(line) for line in (tmp_path / METRICS).read_text().splitlines()]
    assert lines == [
        {"step": step, "reward/mean": 1 / step, "perf/step_seconds": 1.0, "rollout/rounds": 1.0} for step in (1, 2, 3)
    ]
