"""Held-out figures: an answer that earns something is not yet right, and a right one may earn nothing."""

from __future__ import annotations

import pytest

from flowrl_mega.config import OverlongSettings, RewardSettings
from flowrl_mega.evaluation.sampled import sampled_metrics
from flowrl_mega.rewards.load import call, load_reward
from flowrl_mega.rewards.scorer import with_overlong_penalty

ONE_OF_THREE = {"type": "stdin", "inputs": ["1", "2", "3"], "outputs": ["1", "4", "9"]}
COPY = "```python\nprint(input())\n```"  # passes the first test alone
SQUARE = "```python\nprint(int(input()) ** 2)\n```"
FRACTION = {"function": "flowrl_mega.rewards.code:score", "code": {"score": "fraction", "isolation": "process"}}
OWN = """
def graded(row, response):
    return float(response)
def with_a_threshold(row, response):
    return float(response)
with_a_threshold.right_at = 0.75
"""


@pytest.fixture
def own(tmp_path, monkeypatch):
    (tmp_path / "own_reward.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize(
    "settings, response, right",
    [
        ({"function": "own_reward.py:graded"}, "0.01", True),
        ({"function": "own_reward.py:graded"}, "0", False),
        ({"function": "own_reward.py:graded"}, "no number", False),
        ({"function": "own_reward.py:graded", "right_at": 0.5}, "0.5", True),
        ({"function": "own_reward.py:graded", "right_at": 0.5}, "0.49", False),
        ({"function": "own_reward.py:graded", "right_at": -1.0}, "-1", True),
        ({"function": "own_reward.py:with_a_threshold"}, "0.75", True),
        ({"function": "own_reward.py:with_a_threshold"}, "0.7", False),
        ({"function": "own_reward.py:with_a_threshold", "right_at": 0.5}, "0.7", True),
    ],
)
def test_right_is_by_a_threshold_of_the_rewards_own(own, settings, response, right):
    """The setting, else the function's, else any reward above 0; a failed call is never right."""
    reward = load_reward(RewardSettings(**settings))
    assert call(reward, {}, response).right is right


@pytest.mark.parametrize(
    "function, row, response, reward, right",
    [
        ("math:verify", {"answer": "42"}, "\\boxed{42}", 1.0, True),
        ("math:verify", {"answer": "42"}, "\\boxed{41}", 0.0, False),
        ("math:dapo", {"answer": "42"}, "Answer: 42", 1.0, True),
        ("math:dapo", {"answer": "42"}, "Answer: 41", -1.0, False),
        ("sums:score", {"terms": 2, "total": 5}, "2+3", 1.0, True),
        ("sums:score", {"terms": 2, "total": 5}, "2+4", 0.0, False),
        ("by_kind:score", {"kind": "math", "answer": "42"}, "\\boxed{42}", 1.0, True),
    ],
)
def test_ours_say_what_is_right(function, row, response, reward, right):
    score = call(load_reward(RewardSettings(function=f"flowrl_mega.rewards.{function}")), row, response)
    assert (score.reward, score.right) == (reward, right)


@pytest.mark.parametrize("by_kind", [False, True])
def test_a_program_that_passes_some_tests_is_wrong(by_kind):
    settings = FRACTION | ({"function": "flowrl_mega.rewards.by_kind:score"} if by_kind else {})
    reward, row = load_reward(RewardSettings(**settings)), {"kind": "code", "tests": ONE_OF_THREE}
    part, whole = call(reward, row, COPY), call(reward, row, SQUARE)
    assert (part.reward, part.right) == (pytest.approx(1 / 3), False)
    assert (whole.reward, whole.right) == (1.0, True)


def test_reasoning_gyms_consolation_is_not_right():
    """The library's own scorer gives 0.01 for any answer at all to countdown."""
    reasoning_gym = pytest.importorskip("reasoning_gym")
    (entry,) = reasoning_gym.create_dataset("countdown", size=1, seed=0)
    row = {"task": "countdown", "entry": entry, "answer": entry["answer"]}
    reward = load_reward(RewardSettings(function="flowrl_mega.rewards.reasoning_gym:score"))
    wrong = call(reward, row, "<answer>banana</answer>")
    right = call(reward, row, f"<answer>{entry['metadata']['expression']}</answer>")
    assert 0 < wrong.reward < 1 and not wrong.right
    assert right.reward == 1 and right.right


def test_a_right_answer_of_full_length_is_right():
    """DAPO's penalty takes all of its reward."""
    score = call(
        load_reward(RewardSettings(function="flowrl_mega.rewards.sums:score")), {"terms": 2, "total": 5}, "2+3"
    )
    (long,) = with_overlong_penalty([score], [8], 8, OverlongSettings(buffer=4, penalty=1.0))
    assert (long.reward, long.right) == (0.0, True)


def test_figures_of_two_prompts():
    """By hand: a prompt with partial credit, and one with a right answer said twice that the penalty made worthless."""
    found = sampled_metrics(
        ["a", "b", "c", "c", "d", "e"], [0.1, 0.5, 0.0, 0.0, 0.0, 1.0], [False, False, False, True, False, True], 3
    )
    assert found == {
        "reward": pytest.approx(1.6 / 6),
        "best@3": 0.75,
        "right": pytest.approx(2 / 6),
        "pass@3": 0.5,
        "distinct_right@3": 1.0,
    }
