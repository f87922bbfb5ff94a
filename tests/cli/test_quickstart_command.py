"""`flowrl-mega quickstart`: what it refuses, what it starts, and what it makes of the figures, which are made up here.

The trials have tests of their own (tests/examples); the wheel's test has a real quick start."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from flowrl_mega import cli
from flowrl_mega.quickstart import run
from flowrl_mega.quickstart.trials import CONFIG, Trial

Capture = pytest.CaptureFixture[str]


class Trials:
    """Stands in for the ranks: writes figures, and remembers the trials."""

    def __init__(self) -> None:
        self.ran: list[Trial] = []
        self.code = 0

    def __call__(self, trials: Sequence[Trial], file: Path) -> int:
        file.write_text("")
        for trial in trials:
            self.ran.append(trial)
            figures = dict.fromkeys(run.COLUMNS, 0.5) | {"distinct": 4.0 + trial.seed}
            trial.run_dir.mkdir(parents=True)
            trial.file.write_text(json.dumps({"overrides": trial.overrides, "figures": figures}))
            (trial.run_dir / "evaluation.jsonl").write_text('{"step": 2, "pass_rate": 0.5, "distinct": 4.0}\n')
        return self.code


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Trials:
    """Also makes an empty folder the current one."""
    monkeypatch.chdir(tmp_path)
    stand_in = Trials()
    monkeypatch.setattr(run, "run_trials", stand_in)
    return stand_in


# arguments -> the message
BAD = {
    "no seeds": (["--seeds=0"], "--seeds 0: must be at least 1"),
    "the seed": (["--seed=4"], "seed = 4: cannot be changed in the quick start; give --seeds N"),
    "a model": (["--model.path=x"], "model.path = 'x': cannot be changed in the quick start"),
    "a whole section": (["--model", "--model={path: x}"], "'--model': not a setting"),
    "an objective": (["--objective={name: rloo}"], "objective.name = 'rloo': cannot be changed"),
    "a critic": (
        ["--critic={}"],
        "critic.trunk = 'own': cannot be changed in the quick start; none of its methods has one",
    ),
    "unknown": (["--stepss=3"], "stepss: no such setting; did you mean 'steps'?"),
    "of the objective": (["--objective.kl_coef=1"], "objective.kl_coef: no such setting"),
    "nothing held out": (["--data.held_out=null", "--evaluation.every=0"], "data.held_out = None: the table has"),
}


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(case: str, trials: Trials, tmp_path: Path, capsys: Capture) -> None:
    arguments, message = BAD[case]
    assert cli.main(["quickstart", *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("flowrl-mega: ") and said.err.count("\n") == 1
    assert message in said.err
    assert trials.ran == [] and not list(tmp_path.iterdir())


def test_not_as_one_of_many(trials: Trials, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["quickstart"]) == 2
    assert "without torchrun or srun" in capsys.readouterr().err and trials.ran == []


def test_from_the_seeds_to_the_table(trials: Trials, tmp_path: Path, capsys: Capture) -> None:
    """Every method once a seed, from that seed's warm start; settings that were given are every method's, but the
    objective's, which are FlowRL's."""
    assert cli.main(["quickstart", "--seeds=2", "--steps=20", "--objective.beta=3"]) == 0
    assert [(trial.name, trial.seed) for trial in trials.ran] == [(n, seed) for seed in (0, 1) for n in run.METHODS]
    configs = {trial.name: trial.config() for trial in trials.ran if trial.seed == 1}
    assert {config.model.path for config in configs.values()} == {"runs/quickstart/seed_1/start"}
    assert {(config.steps, config.seed) for config in configs.values()} == {(20, 1)}
    assert {name: config.objective.get("beta") for name, config in configs.items() if name != "start"} == {
        "grpo": None, "grpo_kl": None, "flowrl": 3,
    }  # fmt: skip
    folder = Path("runs/quickstart")
    assert [config.run_dir for config in configs.values()] == [
        str(folder / "seed_1" / name) for name in ("start_run", "grpo", "grpo_kl", "flowrl")
    ]
    said = capsys.readouterr().out
    (flowrl,) = [line.split() for line in said.splitlines() if line.startswith("flowrl ")]
    assert "4.50 ±0.71" in " ".join(flowrl) and "runs/quickstart/summary.json, quickstart.png, report.html" in said
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["methods"]["grpo"]["distinct_std"] == pytest.approx(0.5**0.5) and summary["seeds"] == [0, 1]
    assert (folder / "quickstart.png").stat().st_size > 10_000


def test_it_begins_anew_and_removes_nothing_else(trials: Trials, tmp_path: Path, capsys: Capture) -> None:
    assert cli.main(["quickstart", "--seeds=2", "--run_dir=mine"]) == 0
    notes = tmp_path / "mine" / "notes.txt"
    notes.write_text("of the user")
    (tmp_path / "mine" / "faults").mkdir()
    trials.code = 70
    assert cli.main(["quickstart", "--run_dir=mine"]) == 70, "the ranks' own code"
    left = sorted(path.name for path in (tmp_path / "mine").iterdir())
    assert left == ["notes.txt", "seed_0", "trials.json"] and notes.read_text() == "of the user"

    (tmp_path / "grid" / "seed_0").mkdir(parents=True)
    capsys.readouterr()
    assert cli.main(["quickstart", "--run_dir=grid"]) == 2
    assert "run_dir = 'grid': seed_0 is of another command; choose another run_dir" in capsys.readouterr().err
    assert (tmp_path / "grid" / "seed_0").is_dir()


def test_stopped_between_two_seeds(trials: Trials, tmp_path: Path) -> None:
    """As a rank that SIGTERM ended: there is no checkpoint to go on from."""
    asked: list[Any] = []
    assert run.quickstart([], 2, lambda: asked.append(0) or len(asked) > 1) == 143
    assert {trial.seed for trial in trials.ran} == {0} and not Path("runs/quickstart/summary.json").exists()


def test_the_task_is_a_whole_file_of_settings() -> None:
    """`flowrl-mega train` takes it too, once there is a warm start."""
    config = run.load_config(CONFIG)
    assert config.run_dir == "runs/quickstart" and config.data.task == "sums" and config.objective["beta"] == 6
