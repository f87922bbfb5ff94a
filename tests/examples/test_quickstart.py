"""The quick start's trials and the fair comparison: what is started where, that all methods are treated alike, and what
is written down."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from examples import compare
from flowrl_mega import objectives
from flowrl_mega.config import Diverged
from flowrl_mega.config_file import load_config
from flowrl_mega.parallel import launch as launching
from flowrl_mega.quickstart import job, trials
from flowrl_mega.quickstart.trials import Trial

Started = list[tuple[int, dict[str, Any]]]


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> Started:
    """The ranks and the trials of each launch, instead of the launch."""
    launches: Started = []

    def launch(command: list[str], world: int, timeout_s: float | None) -> int:
        launches.append((world, json.loads(Path(command[-1]).read_text())))
        return 0

    monkeypatch.setattr(launching, "launch", launch)
    return launches


def write_figures(trial: Trial, **figures: float) -> None:
    trial.file.parent.mkdir(parents=True, exist_ok=True)
    trial.file.write_text(json.dumps({"overrides": trial.overrides, "figures": figures}))


@pytest.mark.parametrize(("gpus", "ranks"), [(0, 2), (1, 1), (2, 2), (8, 2)])
def test_two_ranks_but_on_a_single_gpu(gpus, ranks, started, tmp_path, monkeypatch):
    """The quick start is there to show real tensor parallelism. On a machine without a GPU, device_count() says 1 to
    please Megatron; a quick start with tp = 1 came of that."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: max(1, gpus))
    assert trials.run_trials([], tmp_path / "trials.json") == 0
    assert trials.run_trials([], tmp_path / "trials.json", side_by_side=True) == 0
    assert [world for world, _ in started] == [ranks, ranks]
    assert [content["overrides"] for _, content in started] == [[f"parallel.tp={ranks}"], ["parallel.tp=1"]]


def test_side_by_side_every_trial_is_run_once_by_a_job_of_one_rank(monkeypatch):
    """Ranks that all ran the first trials, or waited for each other, would still end with a table."""
    names = [Trial("folder", 0, str(n), []) for n in range(7)]
    taken = []
    for rank in range(2):
        for name, value in {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}.items():
            monkeypatch.setenv(name, value)
        taken.append(job.my_trials(names))
        assert [job.os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")] == ["0", "1", str(rank)]
    assert sorted(taken[0] + taken[1]) == sorted(names) and abs(len(taken[0]) - len(taken[1])) <= 1


def test_a_trial_that_diverges_is_a_result_only_where_that_is_asked(tmp_path, monkeypatch):
    """The quick start's tables have no place for it: there the job ends with the run's own message."""

    def diverges(config: Any, layout: Any) -> Any:
        raise Diverged("the last 10 updates were skipped")

    monkeypatch.setattr(job, "run_trial", diverges)
    monkeypatch.setattr(Trial, "config", lambda *_: SimpleNamespace(parallel=None, seed=0))
    monkeypatch.setattr(job.layouts, "init", lambda *_: SimpleNamespace(rank=0))
    monkeypatch.setattr(job.dist, "barrier", lambda: None)
    trial = Trial(str(tmp_path), 0, "grpo", ["a=1"])
    with pytest.raises(Diverged):
        job.run(trial, [], may_diverge=False)
    assert not trial.done
    job.run(trial, [], may_diverge=True)
    assert trial.figures == {"pass_rate": 0.0, "distinct": 0.0, "diverged": 1.0}


def test_done_is_a_trial_of_the_same_overrides(tmp_path):
    """Figures of a shorter trial, or of settings that were changed since, must not end up in the table."""
    trial = Trial(str(tmp_path), 0, "grpo, token mean lr 0.001", ["optimizer.lr=0.001"])
    assert not trial.done
    write_figures(trial, pass_rate=0.5)
    assert trial.done and trial.figures == {"pass_rate": 0.5}
    assert not trial._replace(overrides=["optimizer.lr=0.001", "steps=2"]).done


def test_a_run_folder_of_its_own_for_every_trial(tmp_path):
    """Two names that come to one folder would share their figures."""
    methods = compare.all_methods()
    everything = [*compare.tuning_trials(tmp_path, methods).values()]
    everything += [Trial(everything[0].folder, 0, name, []) for name in ("start", *methods)]
    assert len({trial.run_dir for trial in everything}) == len(everything)
    assert all(trial.run_dir != Path(trial.folder) / "start" for trial in everything), "the warm start's model"


def test_every_method_has_settings_that_are_accepted_and_differ():
    configs = {
        name: load_config(compare.CONFIG, compare.at(1e-3, [*overrides, *compare.COMMON]))
        for name, overrides in compare.all_methods().items()
    }
    built = {name: (objectives.build(config.objective), config) for name, config in configs.items()}
    named = {type(objective) for objective, _ in built.values()}
    assert named == set(objectives.REGISTRY.values()), "the comparison leaves an objective out"
    assert len({str((objective, config.batch)) for objective, config in built.values()}) == len(built)
    assert all((config.critic is not None) == objective.needs_critic for objective, config in built.values())
    others = {
        str(config.model_copy(update={"objective": {}, "critic": None, "batch": 0})) for _, config in built.values()
    }
    assert len(others) == 1, "methods differ by objective, critic and updates a step, and by nothing else"
    assert {config.updates_per_step for _, config in built.values()} == {1, 4}


def test_the_sweep_has_the_matched_coefficient():
    """Facts of the task: right answers of 10..99 have 5.5 tokens with the end token on average, so 1 / (2 x 5.5)."""
    coefficients = [
        load_config(compare.CONFIG, overrides).objective.get("kl_coef")
        for name, overrides in compare.all_methods().items()
        if name.startswith("grpo_kl ")
    ]
    assert coefficients == [0.01, 0.05, 0.0909, 0.2]
    right = [[a + "." for a in row["right_answers"]] for row in compare.sums.Sums(lo=10, hi=99).rows()]
    mean = sum(sum(map(len, answers)) / len(answers) for answers in right) / len(right)
    assert compare.matched_coefficient() == pytest.approx(1 / (2 * mean), abs=1e-4)


def test_all_methods_are_tried_at_all_rates(tmp_path):
    """A method with more trials than another would win by them."""
    methods = compare.all_methods()
    tuning = compare.tuning_trials(tmp_path, methods)
    assert list(tuning) == [(name, rate) for name in methods for rate in (2e-4, 5e-4, 1e-3)]
    for (name, rate), trial in tuning.items():
        assert trial.overrides == [f"optimizer.lr={rate}", *methods[name]] and trial.seed == 100


@pytest.mark.parametrize(
    ("slow", "fast", "best"),
    [
        ((0.90, 9.0), (0.95, 3.0), 5e-4),  # more distinct answers do not make up for a lower pass rate
        ((0.94, 9.0), (0.95, 3.0), 2e-4),  # unless it is near
        ((0.95, 3.0), (0.94, 9.0), 5e-4),
        ((0.95, 9.0), (0.80, 20.0), 2e-4),
    ],
)
def test_the_rule_that_chooses_a_rate(slow, fast, best):
    """Of the rates within 0.02 of the best pass rate, the one with most distinct right answers; as fixed beforehand."""
    figures = {rate: {"pass_rate": p, "distinct": d} for rate, (p, d) in ((2e-4, slow), (5e-4, fast))}
    assert compare.best_rate(figures) == best


def test_the_comparison_from_start_to_table(started, tmp_path, monkeypatch, capsys):
    """With made-up figures: the parts in order, the chosen rate in the final trials, only what is left is run, and the
    table says what the trials came to."""
    monkeypatch.setattr(compare.sys, "argv", ["compare", "--folder", str(tmp_path), "--steps=3"])
    monkeypatch.setattr(compare, "all_methods", lambda: {"grpo": ["a=1"], "grpo_kl 0.05": ["a=2"]})
    launch = launching.launch

    def launch_and_write(command, world, timeout_s):
        code = launch(command, world, timeout_s)
        for trial in started[-1][1]["trials"]:
            slow = "optimizer.lr=0.0002" in trial["overrides"]
            base = dict.fromkeys(("pass_rate", "distinct", *compare.COLUMNS, "pass@64"), 0.25 if slow else 0.125)
            write_figures(Trial(**trial), **base | {"pass_rate": 0.5 + 0.1 * slow, "distinct": 2.0 + trial["seed"]})
        return code

    monkeypatch.setattr(launching, "launch", launch_and_write)
    assert compare.main() == 0
    parts = [[(trial["name"], trial["seed"]) for trial in content["trials"]] for _, content in started]
    assert parts[0] == [("start", seed) for seed in (100, 0, 1, 2)]
    assert [name for name, _ in parts[1]] == [
        f"{m} lr {r}" for m in ("grpo", "grpo_kl 0.05") for r in (0.0002, 0.0005, 0.001)
    ]
    assert sorted(parts[2]) == [(m, seed) for m in ("grpo", "grpo_kl 0.05") for seed in (0, 1, 2)]
    for trial in started[2][1]["trials"]:
        assert trial["overrides"][0] == "optimizer.lr=0.0002" and trial["overrides"][-1] == "--steps=3"
    table = (tmp_path / "compare.md").read_text().splitlines()
    assert [line.count("|") for line in table] == [len(compare.COLUMNS) + 2] * 5
    assert table[-1].startswith("| GRPO + KL 0.05 | 0.0002 | 0.600 ± 0.000 | 3.00 ± 1.00 | 0.250 ± 0.000 |")
    written = json.loads((tmp_path / "compare.json").read_text())
    assert written["rates"] == {"grpo": 2e-4, "grpo_kl 0.05": 2e-4}
    assert len(written["tuning"]) == 6 and written["tuning"]["grpo lr 0.0005"]["pass_rate"] == 0.5
    assert written["overrides"]["grpo"] == ["a=1", *compare.COMMON, "--steps=3"]
    assert (tmp_path / "compare.png").stat().st_size > 10_000

    (lost,) = [Trial(**t) for t in started[2][1]["trials"] if (t["name"], t["seed"]) == ("grpo", 1)]
    lost.file.unlink()
    assert compare.main() == 0
    assert [trial["name"] for trial in started[-1][1]["trials"]] == ["grpo"] and len(started) == 4, "resumes"
