"""The math example as it stands: SmolLM2-135M-Instruct on GSM8K, its chat template, math-verify in worker processes."""

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

# Ours, in GSM8K's form, for machines that do not have it. The last line of each answer is its number.
OWN = [
    {"question": f"A crate holds {n} boxes with {m} pens each. How many pens are in {k} crates?",
     "answer": f"One crate has {n} * {m} = {n * m} pens.\n{k} crates have {n * m} * {k} pens.\n#### {n * m * k}"}
    for n, m, k in [(3, 4, 2), (5, 6, 3), (2, 9, 4), (7, 2, 5), (10, 3, 2), (4, 4, 4), (6, 5, 2), (8, 3, 3)]
]  # fmt: skip


@pytest.fixture(scope="module")
def run(smollm2: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    """Model, prompts and two steps, by the commands at the top of examples/gsm8k.yaml."""
    folder, data = tmp_path_factory.mktemp("gsm8k"), request.config.getoption("--data")
    rows = folder / "train.jsonl"
    if data and (Path(data) / "gsm8k_train.jsonl").is_file():
        rows.write_text("".join((Path(data) / "gsm8k_train.jsonl").open().readlines()[:200]))
    else:
        rows.write_text("\n".join(map(json.dumps, OWN)))
    command(
        "tools/prepare_data.py", "--recipe", "gsm8k", "--input", rows, "--model", smollm2, "--chat-template",
        "--max-prompt-tokens", "512", "--out", folder / "prompts",
    )  # fmt: skip
    settings = {
        "model.path": smollm2, "data.path": folder / "prompts", "run_dir": folder / "run", "steps": 2,
        "rollout.prompts_per_step": 2, "rollout.group_size": 4, "rollout.max_tokens": 48, "data.held_out": "null",
        "checkpoint.at_end": "false",
    }  # fmt: skip
    overrides = [f"--{name}={value}" for name, value in settings.items()]
    command("-m", "flowrl_mega.cli", "train", "examples/gsm8k.yaml", *overrides)
    return folder / "run"


def command(*arguments: object) -> None:
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    called = [sys.executable, *map(str, arguments)]
    done = subprocess.run(called, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]


def records(run: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (run / name).read_text(encoding="utf-8").splitlines()]


@pytest.mark.timeout(1800)
def test_a_real_model_trains_on_real_problems(run: Path) -> None:
    """Both steps change the policy, and every answer has been graded: counted by kind, none failed."""
    metrics = records(run, "metrics.jsonl")
    assert [line["step"] for line in metrics] == [1, 2]
    for line in metrics:
        assert math.isfinite(line["loss/policy"])
        assert line["policy/grad_norm"] > 0
        assert line["reward/failed"] == 0
        assert sum(value for name, value in line.items() if name.startswith("verdict/")) == 8


def test_each_score_has_a_reason_that_can_be_read(run: Path) -> None:
    """What was taken for the answer and what it should have been; a language model is asked in its chat form."""
    samples = records(run, "samples.jsonl")
    assert len(samples) == 2 * 8
    for sample in samples:
        assert "<|im_" not in sample["response"]
        assert sample["reward"] == float(sample["kind"] == "right")
        assert sample["reason"]
    assert sum("boxed" in sample["response"] or any(c.isdigit() for c in sample["response"]) for sample in samples) > 8
