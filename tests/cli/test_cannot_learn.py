"""A run that can no longer learn ends and says so, with a checkpoint: not after days, and not with a traceback."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import Job, records, write_config
from safetensors.torch import load_file, save_file
from tiny_models import make

from flowrl_mega.checkpoint.folder import checkpoints
from flowrl_mega.config import RunError
from flowrl_mega.model.generation import Sampling, draw

pytestmark = pytest.mark.ranks

REWARDS = """
calls = 0

def huge(row, response):
    return 1e308 if len(response) % 2 else -1e308

def huge_for_two_steps(row, response):
    global calls
    calls += 1
    return huge(row, response) if calls <= 32 else float(len(response) % 2)
"""


def run(folder: Path, model: Path, **changes: Any) -> tuple[list[int | None], str, list[dict[str, Any]], list[str]]:
    """Exit codes, what was written, the metrics, and the checkpoints of six steps of one update each, on one rank."""
    (folder / "rewards.py").write_text(REWARDS)
    sections = {"parallel": {"tp": 1}, "batch": {}, "checkpoint": {}, "evaluation": {}, "data": {"task": "sums"}}
    config = write_config(folder, model, **{**sections, "on_nonfinite": {"most": 3}, **changes})
    codes = Job(["train", str(config)], folder / "log", world=1).wait()
    rows = records(folder / "run", "metrics") if (folder / "run" / "metrics.jsonl").exists() else []
    return codes, (folder / "log").read_text(), rows, [path.name for path in checkpoints(folder / "run")]


@pytest.mark.parametrize(
    ("changes", "steps"),
    [
        ({"reward": "rewards.py:huge"}, 3),
        ({"reward": "rewards.py:huge", "steps": 2}, 2),
        ({"optimizer": {"lr": 1e8}}, 4),
    ],
    ids=["rewards of 1e308", "no update in all of the run", "a learning rate of 1e8"],
)
def test_updates_that_are_all_skipped_end_the_run(
    changes: dict[str, Any], steps: int, model: Path, tmp_path: Path
) -> None:
    """After on_nonfinite.most of them; the rate's first update is made, and what it made is not finite."""
    if "reward" in changes:
        changes = {**changes, "reward": f"{tmp_path}/{changes['reward']}"}
    codes, said, rows, saved = run(tmp_path, model, **changes)
    assert codes == [70] and "Traceback" not in said, said
    assert f"the last {min(steps, 3)} updates of the policy were skipped" in said and "(on_nonfinite.most)" in said
    assert (len(rows), saved) == (steps, [f"step_{steps}"])


def test_some_skipped_updates_do_not_end_it(model: Path, tmp_path: Path) -> None:
    """Two in a row, and the count begins anew with the first that is made."""
    codes, said, rows, _ = run(
        tmp_path, model, reward={"function": f"{tmp_path}/rewards.py:huge_for_two_steps", "workers": 0}
    )
    assert codes == [0], said
    assert [row["policy/skipped_updates"] for row in rows] == [1, 2, 2, 2, 2, 2]


def test_weights_that_are_not_finite_are_named(tmp_path: Path) -> None:
    """Not as an index that is out of bounds."""
    model = make("llama", tmp_path / "model", vocab=15)
    weights = load_file(model / "model.safetensors")
    weights["model.norm.weight"][3] = float("nan")
    save_file(weights, model / "model.safetensors", metadata={"format": "pt"})
    codes, said, rows, _ = run(tmp_path, model)
    assert codes == [70] and rows == [], said
    assert "the policy's logits are NaN or infinite" in said and "Traceback" not in said


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(("bad", "refused"), [(float("nan"), True), (float("inf"), True), (-float("inf"), False)])
def test_logits_that_give_no_token(temperature: float, bad: float, refused: bool) -> None:
    """An id of minus infinity is one that is never drawn."""
    logits = torch.zeros(2, 9)
    logits[1, 4] = bad
    noise = torch.tensor([0.999, 0.5])
    if refused:
        with pytest.raises(RunError, match="logits are NaN or infinite"):
            draw(logits, noise, Sampling(4, temperature))
    else:
        token, logp = draw(logits, noise, Sampling(4, temperature))
        assert token[1] != 4 and logp.tolist() == pytest.approx([-math.log(9), -math.log(8)])


@pytest.mark.parametrize("drop_uniform", [False, True])
def test_a_step_that_needs_no_round(drop_uniform: bool, model: Path, tmp_path: Path) -> None:
    """Groups that a round left over fill the next step: nothing is generated in it, at no rate."""
    (tmp_path / "rewards.py").write_text("def score(row, response):\n    return float(len(response) % 2)\n")
    config = write_config(
        tmp_path,
        model,
        steps=4,
        reward=f"{tmp_path}/rewards.py:score",
        rollout={
            "prompts_per_step": 4,
            "group_size": 4,
            "max_tokens": 8,
            "oversample": 3.0,
            "drop_uniform": drop_uniform,
        },
    )
    Job(["train", str(config)], tmp_path / "log").run()
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    idle = [row for row in rows if row["rollout/rounds"] == 0]
    assert len(idle) >= 1 and all("perf/generated_tokens_per_second" not in row for row in idle)
    assert all(row["perf/generated_tokens_per_second"] > 0 for row in rows if row not in idle)
