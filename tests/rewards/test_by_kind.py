"""One reward for mixed data: each row is graded by its own kind, with the real graders."""

from __future__ import annotations

import json
from pathlib import Path

import jobs
import pytest

from flowrl_mega import cli
from flowrl_mega.config import CodeSettings, ConfigError, RewardSettings
from flowrl_mega.rewards.load import call, load_reward
from flowrl_mega.rewards.pool import Pool

SPEC = "flowrl_mega.rewards.by_kind:score"
CODE = {"type": "call", "name": "twice", "inputs": [[2], [5]], "outputs": [4, 10]}
PROGRAM = "```python\ndef twice(x):\n    return {}\n```"


@pytest.mark.parametrize(
    ("row", "response", "reward", "kind"),
    [
        ({"kind": "math", "answer": "0.5"}, r"\boxed{\frac12}", 1.0, "right"),
        ({"kind": "math_dapo", "answer": "0.5"}, "Answer: 1/2", -1.0, "wrong"),
        ({"kind": "code", "tests": CODE}, PROGRAM.format("2 * x"), 0.5 + 0.5, "right"),
        ({"kind": "code", "tests": CODE}, PROGRAM.format("4"), 0.5, "wrong"),
        ({"kind": "sums", "total": 7, "terms": 2}, "3+4", 1.0, ""),
    ],
)
def test_each_row_is_graded_by_its_kind(row: dict, response: str, reward: float, kind: str) -> None:
    """With the settings of the section `rewards`, here the share of a program's tests."""
    score = call(load_reward(RewardSettings(function=SPEC, code=CodeSettings(score="fraction"))), row, response)
    assert (score.reward, score.kind, score.failed) == (reward, kind, False)


@pytest.mark.parametrize("kind, reward", [("math_dapo", -1.0), ("math", 0.0), ("code", 0.0)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_failed_call_scores_what_its_kind_gives_wrong_answers(kind: str, reward: float, workers: int) -> None:
    """An answer that breaks a grader of -1 and 1 is not better than a wrong one; in the rank itself and in a worker."""
    settings, row = RewardSettings(function=SPEC, workers=workers), {"kind": kind, "answer": None, "tests": None}
    if workers:
        pool = Pool(settings, workers)
        score = pool.submit(row, "Answer: 4").result(timeout=120)
        pool.close()
    else:
        score = call(load_reward(settings), row, "Answer: 4")
    assert (score.reward, score.failed, score.kind) == (reward, True, "error"), score


def test_the_kinds_of_the_data_are_checked_at_the_start() -> None:
    """A kind that nobody grades would fail answer by answer; a sandbox is asked for by programs alone."""
    reward = load_reward(RewardSettings(function=SPEC))
    assert reward.describe({"math", "sums"}) == ""
    assert reward.describe({"math", "code"}).startswith("code: sandbox: ")
    with pytest.raises(ConfigError, match=r"a row of the data is of the kind 'maths'; .* \(did you mean 'math'\?\)"):
        reward.describe({"math", "maths"})
    with pytest.raises(ConfigError, match="data has no 'kind'; give each row one of math, math_dapo, code"):
        reward.describe({""})


def test_modules_that_tests_need_are_asked_of_programs_alone() -> None:
    """A row of another kind says nothing about the sandbox."""
    reward = load_reward(RewardSettings(function=SPEC))
    assert reward.describe({"math"}, {"no_such_module"}) == ""
    with pytest.raises(ConfigError, match=r"the tests of the data import no_such_module"):
        reward.describe({"math", "code"}, {"no_such_module", "numpy"})


def test_a_run_says_which_isolation_its_programs_get(
    tiny_llama: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Before anything is trained; nobody should have to guess what a model's programs could do to the machine."""
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"prompt": "12:", "kind": "code", "tests": CODE}))
    config = jobs.write_config(
        tmp_path,
        tiny_llama,
        data={"path": str(rows)},
        reward="flowrl_mega.rewards.code:score",
        evaluation={},
        parallel={},
    )
    assert cli.main(["train", str(config), "--dry-run"]) == 0
    assert "reward      flowrl_mega.rewards.code:score; sandbox: namespaces" in capsys.readouterr().out
    assert cli.main(["train", str(config), "--reward.code.python=/nowhere/python"]) == 2
    assert "reward.code.python = '/nowhere/python': cannot start" in capsys.readouterr().err
    tests = {"type": "check", "name": "f", "code": "import scipy\ndef check(f): pass", "stub": "def f(): pass"}
    rows.write_text(json.dumps({"prompt": "12:", "kind": "code", "tests": tests}))
    assert cli.main(["train", str(config), "--dry-run"]) == 2
    assert "reward.code.packages = [numpy]: the tests of the data import scipy" in capsys.readouterr().err
