"""TensorBoard's own reader finds what was logged, also in a run that was interrupted and goes on."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl_mega.monitor import Monitor

pytest.importorskip("tensorboard", reason="the extra tensorboard is not installed")
pytestmark = pytest.mark.integration


def test_what_tensorboard_reads_is_what_was_logged(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    def run(first: int, last: int, resume_step: int) -> None:
        monitor = Monitor(tmp_path, {"seed": 3}, 4, resume_step, progress=False, tensorboard=True)
        for step in range(first, last + 1):
            monitor.log(step, {"reward/mean": step / 8 + resume_step, "loss/policy": float("nan")})
        monitor.distributions(last, {"residual": {"edges": [-1.0, 0.0, 3.0], "counts": [2, 5]}, "prompts": []})
        monitor.evaluation(last, {"pass_rate": 0.75})
        monitor.close()

    run(1, 3, resume_step=0)
    run(3, 4, resume_step=2)  # step 3 is made again
    events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"scalars": 0, "histograms": 0})
    events.Reload()
    rewards = {event.step: event.value for event in events.Scalars("reward/mean")}
    assert rewards == pytest.approx({1: 0.125, 2: 0.25, 3: 0.375 + 2, 4: 0.5 + 2})
    assert [event.step for event in events.Scalars("evaluation/pass_rate")] == [4]
    assert "loss/policy" not in events.Tags()["scalars"], "NaN is no point of a curve"
    histogram = events.Histograms("loss/residual")[-1].histogram_value
    assert (histogram.min, histogram.max, histogram.num) == (-1.0, 3.0, 7)
    assert list(histogram.bucket) == [2.0, 5.0] and list(histogram.bucket_limit) == [0.0, 3.0]


def test_without_it_nothing_is_imported(tmp_path: Path) -> None:
    Monitor(tmp_path, {}, 1, progress=False).close()
    assert not (tmp_path / "tensorboard").exists()
