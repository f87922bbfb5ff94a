"""`flowrl-mega ablate`: what it refuses, which runs of a grid it starts, and the files that it writes.

Runs are stood in for by writing their records, but for the last test, which has real ones.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from jobs import Job, records, write_config

from flowrl_mega import cli
from flowrl_mega.config_file import load_config
from flowrl_mega.monitor import plots
from flowrl_mega.monitor.run_folder import RunFolder
from flowrl_mega.parallel import launch

Capture = pytest.CaptureFixture[str]
BETAS = ["--vary", "objective.beta=1,2"]


# arguments -> what the message must contain
BAD: dict[str, tuple[list[str], list[str]]] = {
    "unknown setting": (["--vary", "optimizer.learn=1,2"], ["cell learn=1: optimizer.learn: no such setting"]),
    "unknown override": ([*BETAS, "--stepps=3"], ["stepps: no such setting", "'steps'"]),
    "no values": (["--vary", "steps="], ["--vary steps=: its values are empty", "NAME=V1,V2"]),
    "empty list": (["--vary", "steps=[]"], ["--vary steps=[]: its values are empty"]),
    "one is empty": (["--vary", "steps=1,,2"], ["--vary steps=1,,2: its values are empty"]),
    "the last is empty": (["--vary", "steps=1,"], ["--vary steps=1,: its values are empty"]),
    "no name": (["--vary", "=1,2"], ["--vary =1,2: not a setting"]),
    "no =": (["--vary", "steps"], ["--vary steps: not a setting"]),
    "refused value": (["--vary", "steps=3,4,0"], ["cell steps=0: steps = 0", "greater than or equal to 1"]),
    "refused by the objective": (["--vary", "objective.eps=0.1,0.2,-1"], ["cell eps=-1: objective.eps = -1"]),
    "refused together": (
        ["--vary", "batch.mini_batch=8,4", "--vary", "rollout.group_size=4,3"],
        ["cell mini_batch=8,group_size=3: batch.mini_batch = 8", "divisor of 12"],
    ),
    "PPO without a critic": (
        ["--vary", "objective=[{name: grpo}, {name: ppo}]"],
        ["cell objective=ppo: critic = None", "critic={}"],
    ),
    "no such model": (["--vary", "model.path=nowhere"], ["cell path=nowhere: model.path = 'nowhere'"]),
    "twice": (["--vary", "steps=3,4", "--vary", "steps=5,6"], ["--vary steps: this setting is given twice"]),
    "varied and set": (["--vary", "steps=3,4", "--steps=5"], ["--vary steps: this setting is given twice"]),
    "the same twice": (["--vary", "objective.eps=0.2,0.20"], ["eps=0.2-", "have the same settings; leave one out"]),
    "undone by the next": (
        ["--vary", "objective.beta=1,2", "--vary", "objective=[{name: grpo}]"],
        ["cells beta=1,objective=grpo and beta=2,objective=grpo have the same settings"],
    ),
    "the seed": (["--vary", "seed=1,2"], ["--vary seed: cannot be varied", "--seeds N"]),
    "the folder": (["--vary", "run_dir=a,b"], ["--vary run_dir: cannot be varied"]),
    "no seeds": ([*BETAS, "--seeds=0"], ["--seeds 0: must be at least 1"]),
    "not together": (
        ["--vary", "steps+seed_=[[1, 2], 3]"],
        ["--vary steps+seed_=[[1, 2], 3]: 3 is no list of 2 values, one for each of steps+seed_"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD)
def test_refused_before_anything_runs(case: str, trains: Trains, model: Path, tmp_path: Path, capsys: Capture) -> None:
    arguments, parts = BAD[case]
    config = write_config(tmp_path, model)
    assert cli.main(["ablate", str(config), *arguments]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("flowrl-mega: ") and said.err.count("\n") == 1
    for part in parts:
        assert part in said.err, said.err
    assert trains.ran == [] and sorted(tmp_path.iterdir()) == [config], "nothing may run or be written"


def test_not_as_one_of_many(model: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29500"}
    for name, value in place.items():
        monkeypatch.setenv(name, value)
    assert cli.main(["ablate", str(write_config(tmp_path, model)), *BETAS]) == 2
    assert "without torchrun or srun" in capsys.readouterr().err


class Trains:
    """Stands in for the processes of `flowrl-mega train`: writes a run's records and remembers that it ran."""

    def __init__(self) -> None:
        self.ran: list[str] = []
        self.codes: dict[str, int] = {}  # of runs that do not end well
        self.during: Callable[[], None] = lambda: None

    def __call__(self, command: list[str], stop_requested: Callable[[], bool]) -> int:
        assert command[:4] == [sys.executable, "-m", "flowrl_mega.cli", "train"]
        config = load_config(command[4])
        folder = RunFolder(config.run_dir)
        name = f"{folder.path.parent.name} {folder.path.name}"
        self.ran.append(name)
        self.during()
        code = self.codes.get(name, 0)
        folder.truncate(0)
        for step in range(1, config.steps + 1 if code == 0 else 2):
            reward = config.objective["beta"] + config.seed
            numbers = {"reward/mean": reward, "policy/entropy": 1.0, "rollout/response_length": 5.0}
            folder.log(step, {**numbers, "perf/step_seconds": 2.0})
            if step == config.steps:
                folder.evaluation(step, {"reward": reward, "pass@2": 0.5})
        return code


@pytest.fixture
def trains(monkeypatch: pytest.MonkeyPatch) -> Trains:
    """Instead of real runs. Pictures, half a second each, are left to tests/monitor and the last test here."""
    stand_in = Trains()
    monkeypatch.setattr(launch, "launch_job", stand_in)
    monkeypatch.setattr(plots, "ablation_figure", lambda cells, path: path.write_text(str(list(cells))))
    return stand_in


@pytest.fixture
def ablate(model: Path, tmp_path: Path) -> Callable[..., int]:
    path = str(write_config(tmp_path, model))
    return lambda *arguments: cli.main(["ablate", path, *BETAS, "--seeds=2", *arguments])


ALL = ["beta=1 seed_0", "beta=2 seed_0", "beta=1 seed_1", "beta=2 seed_1"]


def test_what_is_done_is_not_done_again(
    trains: Trains, ablate: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    """All cells before the second seed; another value and another seed later add runs and keep the rest."""
    assert ablate("--dry-run") == 0
    said = capsys.readouterr().out
    assert said.count(": 0 of 6 steps") == 4 and not (tmp_path / "run").exists() and trains.ran == []
    assert ablate() == 0
    assert trains.ran == ALL
    said = capsys.readouterr().out
    summary = json.loads((tmp_path / "run" / "ablation.json").read_text())
    assert summary["seeds"] == [0, 1] and list(summary["cells"]) == ["beta=1", "beta=2"]
    cell = summary["cells"]["beta=2"]
    assert cell["settings"] == {"objective.beta": 2}
    assert cell["runs"]["1"] == {
        "reward": 3.0, "entropy": 1.0, "response_length": 5.0, "held_out_reward": 3.0, "held_out_pass@2": 0.5,
        "seconds": 12.0,
    }  # fmt: skip
    assert cell["mean"]["reward"] == 2.5 and cell["std"]["reward"] == pytest.approx(0.5**0.5)
    text = (tmp_path / "run" / "ablation.md").read_text()
    assert text in said and "2.50 ± 0.71" in text
    assert (tmp_path / "run" / "ablation.png").read_text() == "['beta=1', 'beta=2']"

    assert ablate() == 0 and trains.ran == ALL
    assert (tmp_path / "run" / "ablation.md").read_text() == text
    path = str(tmp_path / "config.yaml")
    assert cli.main(["ablate", path, "--vary", "objective.beta=1,2,3", "--seeds=3"]) == 0
    assert trains.ran[4:] == ["beta=3 seed_0", "beta=3 seed_1", "beta=1 seed_2", "beta=2 seed_2", "beta=3 seed_2"]


def test_a_failed_run_is_named_and_the_others_go_on(
    trains: Trains, ablate: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    trains.codes = {"beta=2 seed_0": 70, "beta=1 seed_1": 1}
    assert ablate() == 70, "the first failed run's"
    assert trains.ran == ALL
    text = (tmp_path / "run" / "ablation.md").read_text()
    assert "- beta=2, seed 0: exit code 70" in text and "- beta=1, seed 1: exit code 1" in text
    assert text.count("| 1 of 2 |") == 2
    trains.codes = {}
    assert ablate() == 0
    assert trains.ran[4:] == ["beta=2 seed_0", "beta=1 seed_1"]
    assert "Failed" not in (tmp_path / "run" / "ablation.md").read_text()


@pytest.mark.parametrize("code", [75, 143, 0])
def test_stopped_and_gone_on_with(code: int, trains: Trains, ablate: Callable[..., int], tmp_path: Path) -> None:
    """SIGTERM during the third run: it saves (75), was still starting (143), or was at its last step (0). None after it
    is begun, and what is done has its table."""
    trains.codes = {ALL[2]: code}
    trains.during = lambda: os.kill(os.getpid(), signal.SIGTERM) if len(trains.ran) == 3 else None
    assert ablate() == 75
    assert trains.ran == ALL[:3]
    text = (tmp_path / "run" / "ablation.md").read_text()
    assert "| beta=2 | 1 of 2 |" in text and "Failed" not in text
    trains.codes = {}
    assert ablate() == 0
    assert trains.ran[3:] == (ALL[2:] if code else ALL[3:])


def test_one_run_is_stopped_from_outside(trains: Trains, ablate: Callable[..., int]) -> None:
    """SLURM may tell all processes or the first; a run that stopped on request means the grid."""
    trains.codes = {ALL[0]: 75}
    assert ablate() == 75 and trains.ran == ALL[:1]


def test_without_its_last_evaluation_a_run_is_not_finished(
    trains: Trains, ablate: Callable[..., int], tmp_path: Path
) -> None:
    assert ablate() == 0
    (tmp_path / "run" / "beta=1" / "seed_0" / "evaluation.jsonl").write_text('{"step": 4, "reward": 1}\n{"step": 6')
    assert ablate() == 0
    assert trains.ran[4:] == ["beta=1 seed_0"]


def test_a_folder_of_other_settings(
    trains: Trains, ablate: Callable[..., int], tmp_path: Path, capsys: Capture
) -> None:
    """Nothing runs and nothing changes; but where the folder lies is no difference."""
    assert ablate() == 0
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    capsys.readouterr()
    assert ablate("--optimizer.lr=1e-4", "--objective.eps=0.1", "--steps=7") == 2
    message = capsys.readouterr().err
    assert "beta=1/seed_0: holds a run of other settings: " in message and message.count("\n") == 1
    for part in ("steps was 6 and is 7", "optimizer.lr was 0.001 and is 0.0001", "objective.eps was None and is 0.1"):
        assert part in message
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    (tmp_path / "run").rename(tmp_path / "moved")
    assert ablate(f"--run_dir={tmp_path}/moved") == 0 and trains.ran == ALL
    (tmp_path / "moved" / "beta=2" / "seed_1" / "config.yaml").unlink()
    assert ablate(f"--run_dir={tmp_path}/moved") == 2
    assert "beta=2/seed_1: holds a run without its config.yaml" in capsys.readouterr().err


def test_a_wrong_setting_is_told_before_torch_is_imported(model: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from flowrl_mega import cli; code = cli.main(); assert 'torch' not in sys.modules; sys.exit(code)"
    )
    command = [sys.executable, "-c", code, "ablate", str(write_config(tmp_path, model)), "--vary", "step=1,2"]
    job = subprocess.run(command, timeout=60, capture_output=True, text=True)
    assert (job.returncode, job.stderr) == (
        2,
        "flowrl-mega: cell step=1: step: no such setting; did you mean 'steps'?\n",
    )


WAIT = "import os, signal, sys, time\n"


@pytest.mark.parametrize(
    ("code", "wanted"), [("sys.exit(3)", 3), ("os.kill(os.getpid(), signal.SIGKILL)", 137), ("", 0)]
)
def test_exit_codes_of_a_job(code: str, wanted: int) -> None:
    assert launch.launch_job([sys.executable, "-S", "-c", WAIT + code], lambda: False) == wanted


def test_a_job_is_told_once_to_stop(tmp_path: Path) -> None:
    ready, told = tmp_path / "ready", tmp_path / "told"
    code = (
        f"signal.signal(signal.SIGTERM, lambda *_: open({str(told)!r}, 'a').write('x'))\nopen({str(ready)!r}, 'w')\n"
        f"end = time.monotonic() + 30\nwhile not os.path.exists({str(told)!r}) and time.monotonic() < end:\n"
        "    time.sleep(0.01)\ntime.sleep(0.3)\nsys.exit(75)"
    )
    assert launch.launch_job([sys.executable, "-S", "-c", WAIT + code], ready.exists) == 75
    assert told.read_text() == "x"


CLI = [sys.executable, "-m", "flowrl_mega.cli", "ablate"]
# Time to be stopped in, until all that are to be have been.
SLOW = """
import time
from pathlib import Path

def score(row, response):
    if not Path(__file__).with_name("hurry").exists():
        time.sleep(0.05)
    return response.count("1") / 8
"""


@pytest.mark.integration
@pytest.mark.ranks
@pytest.mark.timeout(900)
def test_a_real_grid_stopped_killed_and_gone_on_with(model: Path, tmp_path: Path) -> None:
    """Two cells, two seeds: SIGTERM in the second run, SIGKILL in the third. In the end all have the records, to the
    bit, of a plain `train` with these settings that nothing disturbed."""
    slow = tmp_path / "slow.py"
    slow.write_text(SLOW)
    small = {
        "parallel": {"tp": 1},
        "checkpoint": {"every": 0, "at_end": False},
        "evaluation": {"every": 4, "samples": 1},
    }
    path = str(write_config(tmp_path, model, reward=f"{slow}:score", steps=4, **small))
    command = [*CLI, path, "--vary", "objective=[{name: grpo}, {name: flowrl, beta: 2}]", "--seeds=2"]
    names, run_dir = ["objective=grpo", "objective=flowrl-beta=2"], tmp_path / "run"

    def interrupt(folder: Path, number: signal.Signals) -> int:
        with subprocess.Popen(command, cwd=tmp_path, env=os.environ | {"PYTHONPATH": os.getcwd()}) as job:
            end = time.monotonic() + 200
            while not (folder / "metrics.jsonl").exists() and job.poll() is None and time.monotonic() < end:
                time.sleep(0.02)
            job.send_signal(number)
            return job.wait(timeout=180)

    second, third = run_dir / names[1] / "seed_0", run_dir / names[0] / "seed_1"
    assert interrupt(second, signal.SIGTERM) == 75
    saved = len(records(second, "metrics"))
    assert 1 <= saved < 4 and (second / "checkpoints" / f"step_{saved}").is_dir() and not third.exists()
    assert interrupt(third, signal.SIGKILL) == -signal.SIGKILL
    (tmp_path / "hurry").touch()
    assert len(records(second, "metrics")) == 4 and not (run_dir / names[1] / "seed_1").exists()
    done = (run_dir / names[0] / "seed_0" / "metrics.jsonl").stat().st_mtime_ns
    assert subprocess.run(command, timeout=600, env=os.environ | {"PYTHONPATH": os.getcwd()}).returncode == 0
    assert (run_dir / names[0] / "seed_0" / "metrics.jsonl").stat().st_mtime_ns == done, "not run again"

    summary = json.loads((run_dir / "ablation.json").read_text())["cells"]
    objectives = ["{name: grpo}", "{name: flowrl, beta: 2}"]
    for name, objective in zip(names, objectives, strict=True):
        for seed in (0, 1):
            alone = tmp_path / f"{name}_{seed}"
            changes = [f"--objective={objective}", f"--seed={seed}", f"--run_dir={alone}"]
            Job(["train", path, *changes], tmp_path / "log", world=1).run()
            for file in ("metrics", "samples", "evaluation"):
                wanted = records(alone, file)
                assert wanted and records(run_dir / name / f"seed_{seed}", file) == wanted, (name, seed, file)
            assert summary[name]["runs"][str(seed)]["reward"] == records(alone, "metrics")[-1]["reward/mean"]
        rewards = [summary[name]["runs"][seed]["reward"] for seed in "01"]
        assert len(set(rewards)) == 2, "a spread to look at"
        assert summary[name]["std"]["reward"] == pytest.approx(np.std(rewards, ddof=1))
    assert (run_dir / "ablation.png").stat().st_size > 10_000
    assert (run_dir / "report.html").stat().st_size > 100_000, "it ends with a page"
