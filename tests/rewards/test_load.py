"""Finding reward functions, and scoring batches in which some calls fail."""

import sys

import numpy as np
import pytest
import torch

from flowrl_mega.config import ConfigError, RewardSettings
from flowrl_mega.rewards.load import Reward, Score, call, load_reward, refuse_all_failed
from flowrl_mega.rewards.sums import score

SOURCE = """
from __future__ import annotations
from dataclasses import dataclass
import helper_of_reward

@dataclass
class Result:  # dataclasses look their module up in sys.modules
    value: float

CONSTANT = 3

def length_reward(row, response):
    return Result(float(len(response)) + helper_of_reward.OFFSET).value

def one_argument(response):
    return 1.0
"""


def score_all(function, rows, responses):
    reward = Reward(function, describe=lambda kinds: "", wrong=0.0, takes_settings=False, is_quick=True)
    return [call(reward, row, response) for row, response in zip(rows, responses, strict=True)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A user's folder with a reward file and a module that it imports."""
    monkeypatch.setattr(sys, "path", list(sys.path))
    (tmp_path / "my_own_reward.py").write_text(SOURCE)
    (tmp_path / "helper_of_reward.py").write_text("OFFSET = 0.5\n")
    yield tmp_path
    for name in ("my_own_reward", "helper_of_reward"):
        sys.modules.pop(name, None)


def test_a_built_in_by_module_name():
    """The name in the examples' YAML files."""
    assert load_reward(RewardSettings(function="flowrl_mega.rewards.sums:score")).function is score


def test_a_file_of_the_users(folder):
    assert load_reward(RewardSettings(function=f"{folder}/my_own_reward.py:length_reward"))({}, "abc") == 3.5


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("missing.py:score", r"cannot import 'missing.py' \(FileNotFoundError"),
        ("my_own_reward.py:lenght_reward", "has no 'lenght_reward'; did you mean 'length_reward'"),
        ("my_own_reward.py:CONSTANT", "is 3, not a function"),
        (
            "my_own_reward.py:one_argument",
            r"must take \(row, response\) or \(row, response, settings\), but takes \(response\)",
        ),
    ],
)
def test_errors_name_the_spec_the_cause_and_the_fix(folder, monkeypatch, spec, message):
    """All of these are found before any rank starts."""
    monkeypatch.chdir(folder)
    with pytest.raises(ConfigError, match=message) as caught:
        load_reward(RewardSettings(function=spec))
    assert repr(spec) in str(caught.value)


def test_scores_keep_their_order_and_reasons():
    """A number alone and a number with a reason are both accepted, numpy's and torch's numbers too."""
    results = iter([1, (0.5, "half"), True, np.float32(0.25), torch.tensor(2.0), (np.int64(3), None, "good")])
    scores = score_all(lambda row, response: next(results), [{}] * 6, ["x"] * 6)
    assert [s.reward for s in scores] == [1.0, 0.5, 1.0, 0.25, 2.0, 3.0]
    assert [s.kind for s in scores] == ["", "", "", "", "", "good"]
    assert all(type(s.reward) is float and not s.failed for s in scores)
    assert scores[1] == Score(0.5, "half", False, right=True)


@pytest.mark.parametrize(
    "bad", [None, "1.0", float("nan"), float("inf"), (1.0, "why", "kind", "more"), [1.0], torch.zeros(2), 10**400, 1j]
)
def test_a_result_that_is_no_finite_number_fails(bad):
    """One NaN in a group would poison the normalised rewards of all its answers."""
    good, failed = score_all(lambda row, response: row["result"], [{"result": 1.0}, {"result": bad}], ["", ""])
    assert good == Score(1.0, "", False, right=True)
    assert failed.failed
    assert failed.reward == 0.0
    assert "not a finite number" in failed.reason


def test_an_exception_fails_one_response_only():
    """Model output is arbitrary text: a parser that trips over one answer must not end a run of days."""
    scores = score_all(lambda row, response: float(response), [{}] * 3, ["1", "abc", "0.5"])
    assert [s.reward for s in scores] == [1.0, 0.0, 0.5]
    assert scores[1].failed
    assert scores[1].reason == "ValueError: could not convert string to float: 'abc'"


def test_a_reward_that_never_works_stops_the_run():
    """Else it would train on zeros without a word; the message shows the cause."""
    scores = score_all(lambda row, response: row["answer"], [{}, {}], ["a", "b"])
    with pytest.raises(ConfigError, match=r"failed on all 2 responses .* KeyError: 'answer'"):
        refuse_all_failed(scores)
    refuse_all_failed([*scores, Score(0.0, "wrong", failed=False)])
    refuse_all_failed([])


def test_settings_reach_a_reward_that_takes_them(folder, monkeypatch):
    """Three arguments: the section `reward`. A failed call scores what the function itself gives wrong answers, so
    that an answer that breaks a grader of -1 and 1 is not better than a wrong one."""
    (folder / "graded.py").write_text(
        "def score(row, response, settings):\n    return settings.timeout_s / row['by']\n\n"
        "def describe(settings, kinds):\n    return f'{settings.timeout_s} {sorted(kinds)}'\n\nscore.wrong = -1.0\n"
    )
    monkeypatch.chdir(folder)
    reward = load_reward(RewardSettings(function="graded:score", timeout_s=8))
    assert call(reward, {"by": 4}, "").reward == 2.0
    assert call(reward, {"by": 0}, "") == Score(-1.0, "ZeroDivisionError: float division by zero", True, "error")
    assert reward.describe({"b", "a"}) == "8.0 ['a', 'b']"
    assert reward.describe({"b"}, {"numpy"}) == "8.0 ['b']"
    sys.modules.pop("graded")
