"""Training fed by the real SGLang: with a server of its own, and attached to one of `flowrl-mega serve`."""

from __future__ import annotations

import json
import math
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Job, records, write_config
from sglang_server import SMALL, server_python
from tiny_models import make

from flowrl_mega.rollout.sglang.endpoints import is_up

pytestmark = [pytest.mark.integration, pytest.mark.servers, pytest.mark.timeout(600)]

SERVER_ARGS = {**SMALL, "max_total_tokens": 4096}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An odd vocabulary, so that tp = 2 and the server pad it, each in its own way."""
    return make("llama", tmp_path_factory.mktemp("model"), vocab=15)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[str]:
    """The URL of a server that `flowrl-mega serve` runs."""
    folder = tmp_path_factory.mktemp("serve")
    config = write_config(folder, model, rollout=rollout(servers=1))
    command = [sys.executable, "-m", "flowrl_mega.cli", "serve", str(config)]
    with open(folder / "log", "w") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log, stdin=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 300
        while not (found := re.search(r"--rollout.servers='\[(http://\S+)\]'", (folder / "log").read_text())):
            assert process.poll() is None and time.monotonic() < end, (folder / "log").read_text()
            time.sleep(0.2)
        yield found[1]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0, (folder / "log").read_text()
        assert not is_up(found[1]), "the server ends with what started it"
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


def rollout(**changes: Any) -> dict[str, Any]:
    return {
        "engine": "sglang", "python": server_python(), "server_args": SERVER_ARGS,
        "prompts_per_step": 4, "group_size": 4, "max_tokens": 8, "start_timeout_s": 240, **changes,
    }  # fmt: skip


def run(folder: Path, model: Path, world: int = 1, **sections: Any) -> list[dict[str, Any]]:
    """The metrics of a run with these settings."""
    folder.mkdir(exist_ok=True)
    fixed = {"parallel": {"tp": world, "timeout_s": 60}, "optimizer": {"lr": 1e-2, "warmup_steps": 0}}
    config = write_config(folder, model, **{**fixed, **sections})
    Job(["train", str(config)], folder / "log", world).run(500)
    return records(folder / "run", "metrics")


def is_sound(rows: list[dict[str, Any]]) -> bool:
    return all(math.isfinite(row["loss/policy"]) and row["policy/grad_norm"] > 0 for row in rows)


def test_a_run_is_fed_by_a_server_of_its_own(tmp_path: Path, model: Path) -> None:
    """Two tensor-parallel ranks, two updates a step at a high rate: after every sync the server's log-probs are the
    trainer's again, which are far from those of the step before. The run's evaluations come from the server, too."""
    rows = run(tmp_path, model, world=2, steps=4, rollout=rollout(sync={"transfer": "distributed"}))
    assert len(rows) == 4 and is_sound(rows)
    assert max(row["mismatch/abs_logp_diff"] for row in rows) < 1e-4
    assert min(row["mismatch/effective_sample_size"] for row in rows) > 0.999
    assert [row["mismatch/max_staleness"] for row in rows] == [0.0] * 4
    assert all(row["perf/push_gb"] > 0 and row["rollout/restarts"] == 0 for row in rows)
    moved = max(abs(row["policy/mean_log_ratio_to_ref"]) for row in rows)
    assert moved > 0.05, "the policy must have moved, or nothing was shown"
    evaluations = records(tmp_path / "run", "evaluation")
    assert [row["step"] for row in evaluations] == [0, 2, 4]
    log = (tmp_path / "run" / "servers" / "server_0.log").read_text()
    assert "The server is fired up" in log


@pytest.mark.parametrize("pause", ["retract", "wait"])
def test_one_step_ahead(pause: str, tmp_path: Path, model: Path, served: str) -> None:
    """The batch of step n is begun before the update of step n - 1: its tokens are at most one update old, some are,
    and the log-probs of those are another policy's, which importance weights correct."""
    settings = rollout(servers=[served], ahead=1, sync={"transfer": "tensor", "pause": pause})
    objective = {"name": "flowrl", "beta": 2.0, "tis": "sum"}
    rows = run(tmp_path, model, steps=4, rollout=settings, objective=objective, evaluation={"every": 0})
    assert len(rows) == 4 and is_sound(rows)
    assert rows[0]["mismatch/max_staleness"] == 0.0
    assert {row["mismatch/max_staleness"] for row in rows[1:]} == {1.0}
    stale = [row for row in rows if row["mismatch/staleness"] > 0]
    assert stale and all(row["mismatch/abs_logp_diff"] > 1e-3 for row in stale)
    assert all(0 < row["mismatch/tis_weight"] <= 2.0 for row in rows)


def test_no_token_is_older_than_allowed(tmp_path: Path, model: Path, served: str) -> None:
    """Two steps ahead, and the first round fills four steps: by the versions of their tokens the groups that it leaves
    for step 4 are three updates old, and dropped. Answers under way at a sync go on with the new weights."""
    settings = rollout(servers=[served], ahead=2, max_staleness=2, oversample=4.0)
    settings["sync"] = {"transfer": "tensor", "pause": "in_place"}
    rows = run(tmp_path, model, steps=4, rollout=settings, evaluation={"every": 0})
    assert len(rows) == 4 and is_sound(rows)
    assert [row["mismatch/max_staleness"] for row in rows[:3]] == [0.0, 1.0, 2.0]
    assert [row["rollout/stale_dropped"] for row in rows[:3]] == [0.0] * 3
    assert rows[3]["mismatch/max_staleness"] <= 2 and rows[3]["rollout/stale_dropped"] >= 4
    assert rows[2]["policy/max_abs_log_ratio"] > 1e-2, "ratios are against who wrote each token"


@pytest.mark.parametrize("drop_uniform", [False, True])
def test_a_step_that_needs_no_round(drop_uniform: bool, tmp_path: Path, model: Path, served: str) -> None:
    """Groups that a round left over fill the next step: no server is asked in it, and it has no rate of generation."""
    (tmp_path / "rewards.py").write_text("def score(row, response):\n    return float(len(response) % 2)\n")
    settings = rollout(servers=[served], oversample=3.0, drop_uniform=drop_uniform, sync={"transfer": "tensor"})
    reward = f"{tmp_path}/rewards.py:score"
    assert is_sound(run(tmp_path, model, steps=4, rollout=settings, reward=reward, evaluation={"every": 0}))
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    idle = [row for row in rows if row["rollout/rounds"] == 0]
    assert idle and len(rows) == 4 and all("perf/generated_tokens_per_second" not in row for row in idle)
    assert all(row["perf/generated_tokens_per_second"] > 0 for row in rows if row not in idle)


def test_partial_rollouts_and_resume(tmp_path: Path, model: Path, served: str) -> None:
    """Answers of up to 12 tokens go on 4 at a time, over the end of a step and over the end of the process: nothing is
    lost, old tokens keep their versions, and the prompts' order does not depend on it."""
    settings = rollout(
        servers=[served],
        max_tokens=12,
        partial_tokens=4,
        oversample=1.5,
        sync={"transfer": "disk", "checksum_every": 1},
    )
    sections = {"rollout": settings, "evaluation": {"every": 0}, "checkpoint": {"every": 1}}
    run(tmp_path, model, steps=2, **sections)
    rows = run(tmp_path, model, steps=5, **sections)
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5] and is_sound(rows)
    assert max(row["rollout/carried_groups"] for row in rows) > 0
    assert max(row["mismatch/max_staleness"] for row in rows) >= 1
    assert max(row["rollout/response_length"] for row in rows) > 4


def test_the_mismatch_budget_ends_a_run_in_words(tmp_path: Path, model: Path, served: str) -> None:
    """Steps ahead at a huge rate drift beyond any budget; the run says so and leaves a checkpoint."""
    settings = rollout(servers=[served], ahead=1, mismatch={"budget": 1e-3, "action": "stop"})
    optimizer = {"lr": 3e-2, "warmup_steps": 0}
    config = write_config(
        tmp_path, model, parallel={"tp": 1}, rollout=settings, optimizer=optimizer, evaluation={"every": 0}
    )
    job = Job(["train", str(config)], tmp_path / "log", 1)
    assert job.wait(300) == [70], job.log.read_text()
    said = job.log.read_text()
    assert "rollout.mismatch.budget = 0.001" in said and "objective.tis" in said and "Traceback" not in said
    last = records(tmp_path / "run", "metrics")[-1]
    assert last["mismatch/abs_logp_diff"] > 1e-3
    assert (tmp_path / "run" / "checkpoints" / f"step_{last['step']}").is_dir()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"hidden_size": 64}, ["hidden", "64", "32"]),
        ({"num_hidden_layers": 3}, ["layers", "3", "2"]),
        ({"vocab": 17}, ["vocab", "17", "15"]),
    ],
    ids=["hidden", "layers", "vocabulary"],
)
def test_a_server_of_another_model_is_refused_before_the_first_step(
    changes: dict[str, int], said: list[str], tmp_path: Path, served: str, capfd: pytest.CaptureFixture[str]
) -> None:
    """Weights of another shape would fail late, in SGLang's words."""
    other = make("llama", tmp_path / "other", **{"vocab": 15, **changes})
    config = write_config(tmp_path, other, parallel={"tp": 1}, rollout=rollout(servers=[served]))
    job = Job(["train", str(config)], tmp_path / "log", 1)
    assert job.wait(120) == [2], job.log.read_text()
    message = job.log.read_text()
    assert all(word in message for word in [served, *said]) and "Traceback" not in message, message
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_a_context_too_short_is_refused_before_the_first_step(tmp_path: Path, model: Path, served: str) -> None:
    config = write_config(tmp_path, model, parallel={"tp": 1}, rollout=rollout(servers=[served], max_tokens=200))
    job = Job(["train", str(config)], tmp_path / "log", 1)
    assert job.wait(120) == [2], job.log.read_text()
    message = job.log.read_text()
    assert "128" in message and "rollout.max_tokens" in message and "Traceback" not in message
    assert json.loads((model / "config.json").read_text())["max_position_embeddings"] == 128
