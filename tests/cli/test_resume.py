"""Stopped, killed, and gone on with: the records of an interrupted run are those of an undisturbed one, to the bit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from jobs import Job, records, write_config

from flowrl_mega.checkpoint import find_checkpoint
from flowrl_mega.checkpoint.folder import checkpoints
from flowrl_mega.cli import main

pytestmark = pytest.mark.ranks

CLI = [sys.executable, "-m", "flowrl_mega.cli"]
TORCHRUN = [
    sys.executable,
    "-m",
    "torch.distributed.run",
    "--standalone",
    "--nproc_per_node=2",
    "-m",
    "flowrl_mega.cli",
]


def assert_same_records(found: Path, wanted: Path) -> None:
    for name in ("metrics", "samples", "evaluation", "distributions"):
        rows, again = records(wanted, name), records(found, name)
        for row in (*rows, *again) if name == "distributions" else ():
            assert len(row.pop("memory_gb")) == 2, "of two ranks, and the machine's"
        assert rows and again == rows, name


def steps(run_dir: Path) -> list[str]:
    return [path.name for path in checkpoints(run_dir)]


def test_a_run_leaves_its_records_and_its_newest_checkpoints(finished: Path) -> None:
    run_dir = finished / "run"
    assert [row["step"] for row in records(run_dir, "metrics")] == [1, 2, 3, 4, 5, 6]
    assert [row["step"] for row in records(run_dir, "evaluation")] == [0, 2, 4, 6]
    assert len({row["loss/policy"] for row in records(run_dir, "metrics")}) == 6, "the run must change something"
    assert steps(run_dir) == ["step_4", "step_6"], "keep_last is 2"
    assert sorted(path.name for path in run_dir.iterdir()) == [
        "checkpoints", "config.yaml", "distributions.jsonl", "evaluation.jsonl", "metrics.jsonl", "run.json",
        "samples.jsonl",
    ]  # fmt: skip
    first, last = records(run_dir, "distributions")
    assert (first["step"], last["step"]) == (1, 6) and first["prompts"][0]["answers"][0]["target"] <= 1
    (start,) = json.loads((run_dir / "run.json").read_text())["starts"]
    assert (start["step"], start["ranks"], start["gpus"]) == (0, 2, 0) and start["versions"]["torch"]
    page = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
    made = ("step", "verdict/", "kind/", "loss/residual_p")
    undocumented = [name for name in records(run_dir, "metrics")[-1] if name not in page and not name.startswith(made)]
    assert not undocumented


@pytest.mark.parametrize(
    ("crash", "left", "unfinished"),
    [
        pytest.param("before_the_first_checkpoint", [], [], marks=pytest.mark.integration),
        pytest.param("between_updates", ["step_2", "step_4"], [], marks=pytest.mark.integration),
        ("while_saving", ["step_2"], [".step_4.partial"]),
        pytest.param("while_removing", ["step_2", "step_4"], [], marks=pytest.mark.integration),
    ],
)
def test_killed_and_resumed(
    crash: str, left: list[str], unfinished: list[str], finished: Path, model: Path, tmp_path: Path
) -> None:
    config = write_config(tmp_path, model)
    codes = Job(["train", str(config)], tmp_path / "log", before=f"crashes:{crash}").wait()
    run_dir = tmp_path / "run"
    assert -signal.SIGKILL in codes, (tmp_path / "log").read_text()
    assert steps(run_dir) == left
    assert [path.name for path in run_dir.glob("checkpoints/.step_*")] == unfinished
    said = Job(["train", str(config), "--resume", "auto"], tmp_path / "log").run()
    assert said.count("taken over, its owner is gone") == (codes[0] == -signal.SIGKILL), "rank 0 holds the lock"
    assert_same_records(run_dir, finished / "run")
    assert steps(run_dir) == ["step_4", "step_6"]
    assert not list(run_dir.glob("checkpoints/.step_*"))


def test_killed_with_answers_kept_for_later_steps(model: Path, tmp_path: Path) -> None:
    """Four batches are written ahead, by weights that no longer exist when the run goes on, a quarter of each step is a
    group of earlier ones, and log Z is frozen as the reference's answers had it: all are in the checkpoint, and the
    records are those of an undisturbed run, to the bit."""
    ahead = {"prompts_per_step": 4, "group_size": 4, "max_tokens": 8, "ahead": 4, "max_staleness": 5}
    ahead["replay"] = {"size": 8, "share": 0.25}
    objective = {"name": "flowrl", "beta": 2.0, "z": "frozen", "z_answers": 6, "reward_norm": "none"}
    (tmp_path / "rewards.py").write_text("def score(row, response):\n    return len(response) % 5 / 4\n")
    sections = {"rollout": ahead, "objective": objective, "reward": f"{tmp_path}/rewards.py:score"}
    runs = []
    for name, crash in (("whole", ""), ("killed", "crashes:between_updates")):
        (tmp_path / name).mkdir()
        config = write_config(tmp_path / name, model, **sections)
        job = Job(["train", str(config)], tmp_path / name / "log", before=crash)
        if crash:
            assert -signal.SIGKILL in job.wait()
            said = Job(["train", str(config)], tmp_path / name / "log").run()
        else:
            said = job.run()
        assert said.count("log Z of 17 prompts, estimated from 6 answers of the reference to each: ") == 1
        runs.append(tmp_path / name / "run")
    assert_same_records(runs[1], runs[0])
    rows = records(runs[0], "metrics")
    assert [row["rollout/replayed_groups"] for row in rows] == [0.0, 1.0, 1.0, 1.0, 1.0, 1.0]
    assert [row["mismatch/staleness"] for row in rows[:5]] == [0.0, 1.0, 2.0, 3.0, 4.0], (
        "all of them by the first weights"
    )
    assert 4 < rows[5]["mismatch/staleness"] < 5 and rows[5]["mismatch/max_staleness"] == 5
    assert len({row["loss/log_z"] for row in rows}) == 6 and all(row["loss/log_z_gap"] > 0 for row in rows)
    assert rows[0]["policy/max_abs_log_ratio"] < rows[5]["policy/max_abs_log_ratio"], (
        "ratios are against who wrote them"
    )


def test_a_closed_terminal_saves_on_all_ranks(finished: Path, model: Path, tmp_path: Path) -> None:
    config, run_dir = write_config(tmp_path, model, checkpoint={"every": 0}), tmp_path / "run"
    assert Job(["train", str(config)], tmp_path / "log", before="crashes:hung_up").wait() == [75, 75]
    assert steps(run_dir) == ["step_3"], (tmp_path / "log").read_text()
    Job(["train", str(config)], tmp_path / "log").run()
    assert_same_records(run_dir, finished / "run")


def test_all_ranks_save_when_it_is_time_on_one(model: Path, tmp_path: Path) -> None:
    """Their clocks differ: one that saved alone would wait for ever."""
    config = write_config(tmp_path, model, checkpoint={"minutes": 1e6, "at_end": False}, steps=2)
    Job(["train", str(config)], tmp_path / "log", before="crashes:late_on_rank_1").run()
    assert steps(tmp_path / "run") == ["step_1", "step_2"]


@pytest.mark.integration
def test_sigterm_saves_and_the_run_goes_on_under_torchrun(finished: Path, model: Path, tmp_path: Path) -> None:
    """Both as a user starts them: processes of their own, one that launches its ranks and one under torchrun."""
    config, run_dir = write_config(tmp_path, model), tmp_path / "run"
    slow = tmp_path / "slow.py"
    slow.write_text(
        "import time\nfrom flowrl_mega.rewards import sums\n"
        "def score(row, response):\n    time.sleep(0.05)\n    return sums.score(row, response)\n"
    )
    with subprocess.Popen(
        [*CLI, "train", str(config), f"--reward={slow}:score", "--checkpoint.every=0"],
        stderr=subprocess.PIPE, text=True,
    ) as job:  # fmt: skip
        end = time.monotonic() + 200
        while not (run_dir / "metrics.jsonl").exists() and job.poll() is None and time.monotonic() < end:
            time.sleep(0.02)
        job.send_signal(signal.SIGTERM)
        errors = job.communicate(timeout=60)[1]
    assert job.returncode == 75, errors
    assert "Traceback" not in errors
    saved = find_checkpoint(run_dir, "auto")
    assert saved is not None and 1 <= len(records(run_dir, "metrics")) < 6
    assert saved.name == f"step_{len(records(run_dir, 'metrics'))}"

    subprocess.run([*TORCHRUN, "train", str(config)], timeout=240, check=True)
    assert_same_records(run_dir, finished / "run")


def test_a_finished_run_says_so(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "run" / "metrics.jsonl").read_bytes()
    assert main(["train", str(finished / "config.yaml")]) == 0
    assert "step 6 of 6: this run is finished" in capsys.readouterr().out
    assert (finished / "run" / "metrics.jsonl").read_bytes() == before


def test_dry_run_says_what_would_run_and_writes_nothing(
    finished: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = write_config(tmp_path, model)
    assert main(["train", str(config), "--dry-run"]) == 0
    said = capsys.readouterr().out
    for part in (
        "2 = tp 2 x dp 1",
        "layers      Megatron-core local spec (",
        "FP8         policy off; reference off",
        "optimizer   ",
        "log Z       mlp",
        "17 to train on, 4 held out",
        "2 update(s), 6 steps",
        "from the start",
    ):
        assert part in said
    assert not (tmp_path / "run").exists()
    assert main(["train", str(config), "--dry-run", "--objective={name: flowrl, z: frozen, reward_norm: none}"]) == 0
    cost = "from 16 answers of the reference to each of 17 prompts: as many as 17 steps generate"
    assert f"log Z       frozen, estimated before the first step {cost}" in capsys.readouterr().out
    assert main(["train", str(finished / "config.yaml"), "--dry-run", "--steps=9", "--parallel.tp=1"]) == 0
    said = capsys.readouterr().out
    assert "1 = tp 1 x dp 1" in said and "resuming" in said and "step_6" in said


@pytest.mark.parametrize("resume", ["never", "older"])
def test_a_run_folder_holds_one_run(resume: str, finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    resume = str(finished / "run" / "checkpoints" / "step_4") if resume == "older" else resume
    assert main(["train", str(finished / "config.yaml"), "--resume", resume]) == 2
    message = capsys.readouterr().err
    assert "holds a run already" in message and resume in message and "--resume auto" in message


def test_fork_from_a_folder_at_another_layout(finished: Path, model: Path, tmp_path: Path) -> None:
    """--resume DIR in a new run folder, with one rank instead of two: the step is the same up to rounding."""
    config, origin = write_config(tmp_path, model), finished / "run" / "checkpoints" / "step_4"
    arguments = [
        "train",
        str(config),
        f"--resume={origin}",
        "--parallel.tp=1",
        "--steps=5",
        "--checkpoint.at_end=false",
    ]
    Job(arguments, tmp_path / "log", world=1).run()
    (found,), wanted = records(tmp_path / "run", "metrics"), records(finished / "run", "metrics")[4]
    assert found["step"] == 5 and steps(tmp_path / "run") == [], "neither at step 4 nor at the end is one due"
    assert found["loss/policy"] == pytest.approx(wanted["loss/policy"], rel=1e-4)
    assert found["policy/grad_norm"] == pytest.approx(wanted["policy/grad_norm"], rel=1e-4)


@pytest.mark.integration
@pytest.mark.parametrize(
    "settings",
    [
        ["--model.dtype=bf16"],
        ["--optimizer.log_z_lr=1e-3"],
        ["--objective={name: ppo, kl_coef: 0.1, kl_target: 0.02}", "--critic.warmup_steps=1", "--model.dtype=bf16"],
    ],
    ids=["bf16", "log_z_lr", "ppo"],
)
def test_other_optimizers_resume_to_the_bit(settings: list[str], model: Path, tmp_path: Path) -> None:
    """Weights in bf16 have fp32 masters, which the checkpoint must hold too; where log Z has the policy's own rate,
    Megatron could not tell its saved parameter groups from the policy's; PPO has a second model and optimizer, and a
    coefficient that moves."""
    config = str(write_config(tmp_path, model))
    Job(["train", config, *settings, "--steps=4"], tmp_path / "log").run()
    origin, again = tmp_path / "run" / "checkpoints" / "step_2", tmp_path / "again"
    Job(["train", config, *settings, "--steps=4", f"--resume={origin}", f"--run_dir={again}"], tmp_path / "log").run()
    assert records(again, "metrics") == records(tmp_path / "run", "metrics")[2:]


def test_learning_rates_may_change_when_resuming(finished: Path, model: Path, tmp_path: Path) -> None:
    """Megatron tells the optimizer's saved parameter groups apart by their rates, and would refuse."""
    config, origin = write_config(tmp_path, model), finished / "run" / "checkpoints" / "step_4"
    changed = ["--optimizer.lr=5e-4", "--optimizer.log_z_lr=2e-3"]
    Job(["train", str(config), f"--resume={origin}", "--steps=5", *changed], tmp_path / "log").run()
    (found,), wanted = records(tmp_path / "run", "metrics"), records(finished / "run", "metrics")[4]
    assert (found["policy/lr"], wanted["policy/lr"]) == (5e-4, 1e-3)


@pytest.fixture
def copied(finished: Path, model: Path, tmp_path: Path) -> Path:
    """A run folder like the finished one's, to break."""
    write_config(tmp_path, model)
    shutil.copytree(finished / "run", tmp_path / "run")
    return tmp_path


def _truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


BROKEN = {
    "truncated": ("__0_0.distcp", _truncate),
    "missing": ("__1_0.distcp", Path.unlink),
    "changed byte": ("__1_0.distcp", _flip),
    "metadata": (".metadata", _flip),
    "garbage list": ("integrity.json", lambda path: path.write_text("{]")),
    "other list": ("integrity.json", lambda path: path.write_text("[1, 2]")),
    "empty list": ("integrity.json", lambda path: path.write_text('{"files": {}}')),
    "no list": ("integrity.json", Path.unlink),
}


@pytest.mark.parametrize("case", BROKEN)
def test_broken_checkpoint(case: str, copied: Path, capsys: pytest.CaptureFixture[str]) -> None:
    name, change = BROKEN[case]
    change(copied / "run" / "checkpoints" / "step_6" / name)
    assert main(["train", str(copied / "config.yaml"), "--steps=9"]) == 2
    message = capsys.readouterr().err
    assert "step_6: broken checkpoint" in message and name in message and "to resume from an older one" in message
    assert message.count("\n") == 1 and "Traceback" not in message


def test_broken_checkpoint_under_a_launcher(copied: Path) -> None:
    """Rank 1 finds the fault in its share of the files: both give up, and it is told once."""
    _flip(copied / "run" / "checkpoints" / "step_6" / "__0_0.distcp")
    job = Job(["train", str(copied / "config.yaml"), "--steps=9"], copied / "log")
    assert job.wait() == [2, 2]
    said = (copied / "log").read_text()
    assert said.count("broken checkpoint, __0_0.distcp has changed") == 1 and "Traceback" not in said


def test_checkpoint_of_another_model(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tiny_models import make

    other = make("llama", tmp_path / "other", vocab=15, hidden_size=16, head_dim=4)
    assert main(["train", str(finished / "config.yaml"), "--steps=9", f"--model.path={other}"]) == 2
    message = capsys.readouterr().err
    assert "hidden is 32, these settings make 16" in message and "model.path" in message
    assert main(["train", str(finished / "config.yaml"), "--steps=9", "--objective.z=constant"]) == 2
    assert "log_z is 'mlp', these settings make 'constant'" in capsys.readouterr().err
    for resume in ("nowhere", str(finished / "run")):
        assert main(["train", str(finished / "config.yaml"), "--resume", resume]) == 2
        assert f"--resume {resume}: not a checkpoint folder" in capsys.readouterr().err


def test_a_resume_says_what_is_different_and_mixes_nothing(model: Path, tmp_path: Path) -> None:
    """Carried answers of another group size would stand under other prompts; the settings of both parts are kept."""
    (tmp_path / "rewards.py").write_text(
        "def score(row, response):\n    return float(len(response) % 2), f'of {row[\"prompt\"]}'\n"
    )
    config = write_config(
        tmp_path,
        model,
        steps=1,
        reward=f"{tmp_path}/rewards.py:score",
        parallel={"tp": 1},
        rollout={"prompts_per_step": 4, "group_size": 4, "max_tokens": 8, "oversample": 1.5},
    )
    Job(["train", str(config)], tmp_path / "log", world=1).run()
    run_dir = tmp_path / "run"
    before = (run_dir / "config.yaml").read_text()
    changed = ["train", str(config), "--steps=2", "--rollout.group_size=2", "--batch.mini_batch=8"]
    planned = Job([*changed, "--dry-run"], tmp_path / "dry", world=1, environments=[dict(os.environ)]).run()
    assert "compared    rollout.group_size: 4 -> 2\n            2 of 2 carried prompts are asked again" in planned
    said = Job(changed, tmp_path / "log", world=1).run()
    assert f"resuming {run_dir}/checkpoints/step_1: rollout.group_size: 4 -> 2" in said
    assert "2 of 2 carried prompts are asked again, because of rollout.group_size" in said
    rows = [row for row in records(run_dir, "samples") if row["step"] == 2]
    assert rows and all(row["reason"] == f"of {row['prompt']}" for row in rows)
    assert (run_dir / "config.until_step_1.yaml").read_text() == before != (run_dir / "config.yaml").read_text()
    again = Job([*changed, "--steps=3", "--optimizer.lr=0.5"], tmp_path / "log", world=1).run()
    assert "step_2: optimizer.lr: 0.001 -> 0.5" in again and "group_size" not in again.split("step_2: optimizer")[1]
    assert sorted(path.name for path in run_dir.glob("config*")) == [
        "config.until_step_1.yaml", "config.until_step_2.yaml", "config.yaml",
    ]  # fmt: skip
