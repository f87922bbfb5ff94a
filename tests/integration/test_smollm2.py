"""Two steps of the real example: SmolLM2-135M-Instruct with its chat template, reasoning-gym and its scorers."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.integration


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The example as `make example-smollm2` runs it, stopped after one step and resumed for the second."""
    folder = tmp_path_factory.mktemp("smollm2") / "run"
    for steps in (1, 2):
        command = [sys.executable, "-m", "examples.smollm2.run", f"--steps={steps}", f"--run_dir={folder}"]
        environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
        assert done.returncode == 0, done.stderr[-3000:]
    return folder


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.timeout(1800)
def test_two_steps_train_and_resume(run: Path) -> None:
    """The second call continues from the first one's checkpoint; losses are finite and the policy moves."""
    first, second = records(run, "metrics.jsonl")
    assert (first["step"], second["step"]) == (1, 2)
    assert all(math.isfinite(row["loss/policy"]) and row["policy/grad_norm"] > 0 for row in (first, second))
    assert first["policy/skipped_updates"] == second["policy/skipped_updates"] == 0
    # Nothing has been learnt yet: policy = reference.
    assert first["policy/mean_log_ratio_to_ref"] == pytest.approx(0, abs=1e-6)
    assert abs(second["policy/mean_log_ratio_to_ref"]) > 1e-6


def test_samples_are_readable(run: Path) -> None:
    """Chat-formatted prompts give the answers of a language model, not byte salad: words of letters, mostly."""
    samples = records(run, "samples.jsonl")
    assert len(samples) == 16
    text = " ".join(sample["response"] for sample in samples)
    assert "<|im_" not in text
    common = sum(text.lower().count(f" {word} ") for word in ("the", "is", "of", "a", "to"))
    assert common >= len(text.split()) / 20, text
    assert {sample["reward"] for sample in samples} <= {0.0, 1.0}
