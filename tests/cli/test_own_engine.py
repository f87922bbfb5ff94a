"""One's own engine, in a file outside the package; and the counters of a step's rounds, as a run logs them."""

from __future__ import annotations

import json
import re
from itertools import islice
from pathlib import Path

import pytest
import yaml
from jobs import Job, records

PAGE = Path(__file__).parents[2] / "docs" / "rollout_sglang.md"
pytestmark = pytest.mark.ranks

ENGINE = """
from flowrl_mega.rollout import EmbeddedEngine


class Counting(EmbeddedEngine):
    \"\"\"The embedded engine; a step's metrics say which methods were called since the last one.\"\"\"

    def __init__(self, setup):
        super().__init__(setup.layout)
        assert "config.json" in setup.side_files and setup.arch.vocab and setup.config.steps
        self.calls = {"sync": 0, "start": 0, "finish": 0, "release": 0}

    def sync(self, policy, version):
        self.calls["sync"] += 1
        return super().sync(policy, version)

    def start(self, requests, sampling, seed, on_answer=None):
        self.calls["start"] += 1
        return super().start(requests, sampling, seed, on_answer)

    def finish(self, job):
        self.calls["finish"] += 1
        return super().finish(job)

    def release(self):
        self.calls["release"] += 1

    def metrics(self):
        counts = {f"own/{name}": float(count) for name, count in self.calls.items()}
        self.calls = dict.fromkeys(self.calls, 0)
        return counts

    def close(self):
        open("closed", "a").close()
        super().close()
"""
# In the order of the calls: the answers of every second prompt are all worth 0, those of the others 0, 1, 0, 1 ...
REWARD = """
import itertools

calls = itertools.count()


def score(row, response):
    with open("scored", "a") as file:
        print(row["answer"], file=file)
    return float(next(calls) % 2 if int(row["answer"]) % 2 else 0)


score.is_quick = True
"""


@pytest.fixture
def folder(model: Path, tmp_path: Path) -> Path:
    rows = [{"prompt": f"{digit}:", "answer": str(digit)} for digit in range(10)]
    (tmp_path / "digits.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "my_engine.py").write_text(ENGINE)
    (tmp_path / "my_reward.py").write_text(REWARD)
    settings = {
        "run_dir": "run",
        "steps": 2,
        "model": {"path": str(model)},
        "data": {"path": "digits.jsonl"},
        "reward": "my_reward:score",
        "rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": 4},
        "optimizer": {"lr": 1e-3, "warmup_steps": 0},
    }
    (tmp_path / "digits.yaml").write_text(yaml.safe_dump(settings))
    return tmp_path


def run(folder: Path, *flags: str, world: int = 1) -> list[dict]:
    """The metrics of a run, without times."""
    name = f"run{len(list(folder.glob('run*')))}"
    Job(["train", "digits.yaml", f"--run_dir={name}", *flags], folder / "log", world, cwd=folder).run()
    return records(folder / name, "metrics")


@pytest.mark.parametrize("engine", ["my_engine:Counting", "my_engine.py:Counting"])
def test_an_engine_from_outside_the_package(engine: str, folder: Path) -> None:
    """Two steps through the command line: it is called as the built-in ones are, and closed. As it generates with the
    embedded engine's tokens, all other metrics are the embedded engine's, too."""
    found = run(folder, f"--rollout.engine={engine}")
    calls = [{key.removeprefix("own/"): row.pop(key) for key in list(row) if key.startswith("own/")} for row in found]
    assert calls[0] == {"sync": 2, "start": 1, "finish": 1, "release": 1}, "one sync before the first step"
    assert calls[1] == {"sync": 1, "start": 1, "finish": 1, "release": 1}
    assert (folder / "closed").exists()
    assert found == run(folder)


def test_the_pages_engine_on_two_ranks(folder: Path) -> None:
    """As it stands there, built and called on every rank."""
    (code,) = re.findall(r"```python\n(from flowrl_mega.rollout import .*?)```", PAGE.read_text(), flags=re.DOTALL)
    (folder / "readme.py").write_text(code)
    found = run(folder, "--rollout.engine=readme.py:Counting", "--parallel.dp=2", world=2)
    tokens = [8 * row["rollout/response_length"] for row in found]
    assert [row["rollout/tokens"] for row in found] == pytest.approx(tokens), "since the last call"


def test_it_is_named_in_a_dry_run(folder: Path) -> None:
    flags = ["--rollout.engine=my_engine.py:Counting", "--dry-run"]
    said = Job(["train", "digits.yaml", *flags], folder / "log", 1, cwd=folder).run()
    assert "my_engine.py:Counting, from outside the package" in said


def test_rounds_and_dropped_groups_are_logged(folder: Path) -> None:
    """Worked out from the order in which prompts were scored: a round has as many as the step still lacks."""
    found = run(folder, "--rollout.drop_uniform=true", "--steps=4")
    order = [int(line) for line in (folder / "scored").read_text().split()][::4]
    expected, seen = [], iter(order)
    for _ in range(4):
        lacking, rounds, dropped = 2, 0, 0
        while lacking:
            uniform = [digit % 2 == 0 for digit in islice(seen, lacking)]
            lacking, rounds, dropped = sum(uniform), rounds + 1, dropped + sum(uniform)
        expected.append((rounds, dropped))
    assert [(row["rollout/rounds"], row["rollout/uniform_dropped"]) for row in found] == expected
    assert next(seen, None) is None and sum(dropped for _, dropped in expected) > 0
    assert [row["rollout/carried_groups"] for row in found] == [0] * 4
