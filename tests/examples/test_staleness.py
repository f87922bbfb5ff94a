"""What is compared on stale answers and by which rules, without its training: methods that differ, rates and seeds
chosen as told, figures that are kept, and a page that says what they are."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.autograd import grad

from examples import compare
from examples.staleness import page, study
from examples.staleness.methods import PARTS, all_methods
from examples.staleness.results import Results
from examples.staleness.study import Study, beyond
from flowrl_mega import objectives
from flowrl_mega.config import Config
from flowrl_mega.config_file import load_config
from flowrl_mega.objectives import LossInputs
from flowrl_mega.quickstart.trials import Trial

AGE = PARTS["age"]


def config_of(name: str, ahead: int) -> Config:
    overrides = [*AGE.methods(ahead)[name].overrides, *AGE.overrides(ahead), *compare.COMMON]
    return load_config(compare.CONFIG, overrides)


def test_methods_are_accepted_and_differ_by_their_objective_alone() -> None:
    configs = {name: config_of(name, 8) for name in AGE.methods(8)}
    built = {name: objectives.build(config.objective) for name, config in configs.items()}
    assert len({str(o) for o in built.values()}) == len(built) == 22
    assert {config.rollout.ahead for config in configs.values()} == {8}
    assert len({str(c.model_copy(update={"objective": {}, "critic": None})) for c in configs.values()}) == 1
    for name, objective in built.items():
        is_behaviour = objective.is_old_behaviour(configs[name].rollout.writes_ahead)
        assert is_behaviour == (name not in ("rloo, matched KL, sequence weight", "rloo, matched KL, decoupled"))


def test_the_matched_coefficient_goes_with_the_length() -> None:
    """1 / (beta L): 5.5, 23.5 and 95.5 tokens, each character once, 5 and 21 times, and the end."""
    assert {key: round(part.length, 1) for key, part in PARTS.items()} == {
        "age": 5.5, "length-24": 23.5, "length-96": 95.5, "updates": 5.5,
    }  # fmt: skip
    for part in PARTS.values():
        assert part.kl == pytest.approx(1 / (2 * part.length), abs=5e-5)
    config = load_config(compare.CONFIG, PARTS["length-24"].overrides(16))
    assert config.data.task_args["repeat"] == 5 and config.rollout.max_tokens > 5 * 5


@pytest.mark.parametrize("name", [name for name, m in all_methods(0.09).items() if m.fresh])
def test_with_fresh_answers_it_is_the_run_that_stands_for_it(name: str) -> None:
    """The same gradient at pi_theta = pi_old = pi_rollout, so that one run serves for both."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.tensor([3, 1, 7, 2, 5, 4])
    bounds = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    old, ref, rewards = (torch.randn(n, generator=generator, dtype=torch.float64) for n in (22, 22, 6))
    group = torch.tensor([0, 0, 0, 1, 1, 1])
    found = []
    for method in (name, all_methods(0.09)[name].fresh):
        assert method
        objective = objectives.build(load_config(compare.CONFIG, all_methods(0.09)[method].overrides).objective)
        logp = old.clone().requires_grad_()
        log_z = torch.tensor([0.3] * 6, dtype=torch.float64) if objective.log_z and objective.log_z.learned else None
        s = LossInputs(logp, old, ref, log_z, bounds, objective.credit(rewards, group), group=group, groups=2)
        s = replace(s, rollout_logp=old, trainer_logp=None)
        (given,) = objective.prepare([s], lambda x: x, 2)
        found.append(grad(objective.loss(replace(s, prepared=given)).loss_sum, logp)[0])
    assert found[0].abs().max() > 0
    torch.testing.assert_close(found[0], found[1], rtol=1e-12, atol=1e-14)


def test_a_grid_is_widened_where_its_best_lies_at_an_edge() -> None:
    grid = set(study.RATES)
    assert beyond(grid, 5e-4) == beyond(grid, 2e-4) == set()
    assert beyond(grid, 1e-3) == {2e-3} and beyond(grid, 1e-4) == {5e-5}
    assert beyond(grid | {2e-3, 4e-3}, 4e-3) == set() and beyond(grid | {5e-5, 2.5e-5}, 2.5e-5) == set()


def test_one_thing_is_left_out_at_a_time() -> None:
    """Four updates of 64 answers each, at one rate; runs differ from the first by one setting, but for two of them."""
    part = PARTS["updates"]
    configs = {
        name: load_config(compare.CONFIG, [*m.overrides, *part.overrides(0), *compare.COMMON])
        for name, m in part.methods(0).items()
    }
    assert {config.updates_per_step for config in configs.values()} == {4}
    first = configs["flowrl, w paper"]
    for name, config in configs.items():
        mine, its = ({**c.objective, "log_z_lr": c.optimizer.log_z_lr} for c in (first, config))
        differ = {key for key in mine | its if mine.get(key) != its.get(key)}
        if name not in ("flowrl, w paper", "flowrl, z group, no floor", "grpo, no std, matched KL (k2)"):
            assert len(differ) == 1, name
    study_of = Study("updates", 0, Path("x"), Results(Path("x.json")))
    assert study_of.trial("flowrl, no w", 1e-3, 3).overrides[0] == "optimizer.lr=0.001"


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """(name, seed) of every trial, in their order. In place of training: `good` is best at 2e-3, beyond the grid;
    the others never come near it."""
    ran: list[tuple[str, int]] = []

    def run_trials(trials: Any, file: Path, **_: Any) -> int:
        for trial in trials:
            ran.append((trial.name, trial.seed))
            rate = float(trial.overrides[0].partition("=")[2]) if trial.name != "start" else 0.0
            passed = (0.9 if trial.name.startswith("good") else 0.7) - abs(rate - 2e-3) * 100
            figures = {"pass_rate": passed, "distinct": 5.0 + trial.seed, "held_out_pass_rate": 0.5, "kl": 1.0}
            trial.file.parent.mkdir(parents=True, exist_ok=True)
            content = {"overrides": trial.overrides, "figures": figures | {"seconds": 3.0}}
            trial.file.write_text(json.dumps(content))
        return 0

    monkeypatch.setattr(study, "run_trials", run_trials)
    known = all_methods(0.1)
    methods = {name: replace(known[of], fresh=None) for name, of in (("good", "grpo"), ("poor", "cispo"))}
    methods["base, matched KL"] = known["rloo, matched KL, PPO clip"]
    monkeypatch.setattr("examples.staleness.methods.all_methods", lambda kl: methods)
    return ran


def test_from_rates_to_the_page(
    trained: list[tuple[str, int]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    monkeypatch.setattr(page, "PICTURE", tmp_path / "picture.png")
    monkeypatch.setattr(page, "PICTURED", ("good", "poor"))
    results = Results(tmp_path / "results.json")
    Study("age", 8, tmp_path / "runs", results).run()
    tried = [(name.split()[0], float(name.split()[-1])) for name, seed in trained if seed == 100 and name != "start"]
    grid = [1e-4, 2e-4, 5e-4, 1e-3, 2e-3, 4e-3]
    assert sorted(tried) == sorted((name, rate) for name in ("good", "poor", "base,") for rate in grid)
    seeds = [(name.split()[0], seed) for name, seed in trained if seed != 100 and name != "start"]
    judged = [(name, seed) for name in ("base,", "good") for seed in range(5)]
    assert sorted(seeds) == judged + [("poor", 0), ("poor", 1)], "a clear loser; with the matched KL it stays"
    assert {name.split()[-1] for name, seed in trained if seed != 100 and name != "start"} == {"0.002"}
    assert [seed for name, seed in trained if name == "start"] == [100, 0, 1, 2, 3, 4]

    again = Results(tmp_path / "results.json")  # as in another clone, without the runs
    count = len(trained)
    Study("age", 8, tmp_path / "elsewhere", again).run()
    assert len(trained) == count, "what is in the results is not run again"

    Study("age", 0, tmp_path / "runs", again).run()  # a picture takes two ages

    page.PAGE.write_text(f"words\n\n{page.BEGIN}\n{page.END}\n\nmore\n")
    page.write(again)
    text = page.PAGE.read_text()
    assert text.startswith("words\n") and text.endswith("more\n") and "### Answers of six tokens" in text
    lines = [line for line in text.splitlines() if line.startswith(("| good", "| poor"))]
    assert lines == 2 * [
        "| good | 0.002 | 5 | 0.900 ± 0.000 | 7.00 ± 1.58 | 0.500 ± 0.000 | 1.00 ± 0.00 |",
        "| poor | 0.002 | 2 | 0.700 ± 0.000 | 5.50 ± 0.71 | 0.500 ± 0.000 | 1.00 ± 0.00 |",
    ]
    assert (tmp_path / "picture.png").stat().st_size > 10_000
    assert "seconds" not in (tmp_path / "results.json").read_text()


def test_other_settings_are_another_trial(tmp_path: Path) -> None:
    """Figures of shorter runs must not end up among the others."""
    results = Results(tmp_path / "results.json")
    trial = Study("age", 8, tmp_path, results).trial("grpo", 1e-3, 0)
    trial.file.parent.mkdir(parents=True)
    trial.file.write_text(json.dumps({"overrides": trial.overrides, "figures": {"pass_rate": 0.5}}))
    results.add("age", 8, [trial])
    assert Results(tmp_path / "results.json").figures("age", 8, trial) == {"pass_rate": 0.5}
    shorter = Study("age", 8, tmp_path, results, steps=3).trial("grpo", 1e-3, 0)
    assert isinstance(shorter, Trial) and results.figures("age", 8, shorter) is None
    assert results.figures("age", 16, trial) is None
