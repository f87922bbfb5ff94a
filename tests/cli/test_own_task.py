"""One's own task, as the README shows it: a JSON lines file, a function in a file beside it, and a few settings."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jobs import Job, records

from flowrl_mega.checkpoint.folder import checkpoints

REWARD = """
def score(row, response):
    \"\"\"1 where the answer begins with the row's digit; the text says why.\"\"\"
    right = response.startswith(row["answer"])
    return float(right), "right" if right else f"does not begin with {row['answer']}"
"""


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{digit}:", "answer": str(digit), "level": "easy"} for digit in range(10)]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_reward.py").write_text(REWARD)
    settings = {
        "run_dir": "runs/digits",
        "steps": 2,
        "model": {"path": str(model)},
        "data": {"path": "digits.jsonl", "held_out": 0.2},
        "reward": "my_reward:score",
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 4},
        "optimizer": {"lr": 1e-3},
    }
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


@pytest.mark.ranks
def test_two_steps_of_training(folder: Path) -> None:
    said = Job(["train", "digits.yaml"], folder / "log", world=1, cwd=folder).run()
    assert "step 2/2" in said
    run_dir = folder / "runs" / "digits"
    metrics = records(run_dir, "metrics")
    assert [row["step"] for row in metrics] == [1, 2]
    assert all(row["reward_failed"] == 0 and row["skipped_updates"] == 0 for row in metrics)
    samples = records(run_dir, "samples")
    assert len(samples) == 8
    for row in samples:
        right = row["response"].startswith(row["prompt"][0])
        assert row["reward"] == right and row["reason"] == (
            "right" if right else f"does not begin with {row['prompt'][0]}"
        )
    assert [path.name for path in checkpoints(run_dir)] == ["step_2"], "every = 0 and at_end: one, at the end"
    written = yaml.safe_load((run_dir / "config.yaml").read_text())
    assert written["data"]["path"] == "digits.jsonl" and written["optimizer"]["lr"] == 1e-3

    Job(["train", "digits.yaml", "--steps=3"], folder / "log", world=1, cwd=folder).run()
    assert [row["step"] for row in records(run_dir, "metrics")] == [1, 2, 3], "raising steps goes on"
