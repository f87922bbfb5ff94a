"""One's own task, without a change of the package: a JSON lines file or a class, and a reward function beside it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from jobs import Job, records, write_config

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
    assert all(row["reward/failed"] == 0 and row["policy/skipped_updates"] == 0 for row in metrics)
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


TASK = '''
class Parity:
    """docs/data.md's example."""

    def __init__(self, highest=9):
        self.highest = highest

    def rows(self):
        return [{"prompt": f"{n}:", "parity": n % 2} for n in range(self.highest + 1)]


def score(row, response):
    return float(response[-1:].isdigit() and int(response[-1]) % 2 == row["parity"])
'''


@pytest.mark.ranks
def test_two_steps_on_a_task_that_is_a_class(model: Path, tmp_path: Path) -> None:
    """data.task: parity.py:Parity. The rewards are those of its rows, and a share of them is held out."""
    (tmp_path / "parity.py").write_text(TASK)
    config = write_config(
        tmp_path,
        model,
        steps=2,
        parallel={"tp": 1},
        data={"task": "parity.py:Parity", "task_args": {"highest": 19}, "held_out": 0.2},
        reward="parity.py:score",
        rollout={"prompts_per_step": 4, "group_size": 4, "max_tokens": 3},
        monitor={"progress": False, "samples_per_step": 16},
    )
    Job(["train", str(config)], tmp_path / "log", world=1, cwd=tmp_path).run()
    samples = records(tmp_path / "run", "samples")
    assert len(samples) == 32 and {row["prompt"] for row in samples} <= {f"{n}:" for n in range(20)}
    for row in samples:
        last = row["response"][-1:]
        assert row["reward"] == (last.isdigit() and int(last) % 2 == int(row["prompt"][:-1]) % 2)
    assert [row["step"] for row in records(tmp_path / "run", "evaluation")] == [0, 2]
