"""What is told of target and policy, against exact sums over a space that can be listed; and what a record holds."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from flowrl_mega.monitor import distributions
from flowrl_mega.monitor.distributions import Residuals, Watched

COUNTS = np.array([1, 4, 10, 25, 30, 22, 8])  # of answers in a hundred
OUTCOMES, P = len(COUNTS), COUNTS / 100  # the policy
TARGET = np.array([0.1, 0.3, 0.2, 0.05, 0.15, 0.12, 0.08])
SCALE = np.array([1.0, 3.0, 2.0, 4.0, 1.0, 2.0, 3.0])
DELTA = -(np.log(TARGET) - np.log(P)) / SCALE


def drawn(scale: np.ndarray = SCALE, delta: np.ndarray = DELTA) -> tuple[Watched, Residuals]:
    """A hundred answers, each as often as the policy gives it: means over them are those over the whole space."""
    y = np.random.default_rng(0).permutation(np.repeat(np.arange(OUTCOMES), COUNTS))
    right = (y < 3).tolist()
    said = [f"answer {i}" for i in y]
    of = Watched("prompt", said, [float(r) for r in right], right, [3] * 100)
    return of, Residuals(delta[y], np.full(100, 1.5), scale[y])


def test_the_estimates_are_those_of_the_whole_space() -> None:
    """KL and total variation by sums over all outcomes; answers of different lengths."""
    of, r = drawn()
    found = distributions.metrics([of], r)
    kl = float((P * np.log(P / TARGET)).sum())
    tv = float(np.abs(P - TARGET).sum()) / 2
    worth = 1 / float((TARGET**2 / P).sum())
    assert kl > 0.05 and tv > 0.1 and worth < 0.95
    assert found["target/kl"] == pytest.approx(kl, rel=1e-9)
    assert found["target/total_variation"] == pytest.approx(tv, rel=1e-9)
    assert found["target/sample_size"] == pytest.approx(worth, rel=1e-9)
    entropy = -float((P * np.log(P)).sum())
    assert found["diversity/answer_entropy"] == pytest.approx(entropy, rel=1e-9)
    assert found["diversity/distinct_answers"] == OUTCOMES and found["diversity/distinct_right"] == 3


def test_bars_give_each_answer_what_the_target_does() -> None:
    of, r = drawn()
    (bars,) = distributions.record([of], r)["prompts"]
    assert len(bars["answers"]) == OUTCOMES
    assert [a["count"] for a in bars["answers"]] == sorted((a["count"] for a in bars["answers"]), reverse=True)
    for answer in bars["answers"]:
        y = int(answer["text"].split()[1])
        assert answer["empirical"] == pytest.approx(P[y], abs=1e-6)
        assert answer["target"] == pytest.approx(TARGET[y], abs=1e-6)
        assert answer["reward"] == float(y < 3)


@pytest.mark.parametrize("scale", [np.ones(OUTCOMES), SCALE], ids=["whole sequence", "1/|y|"])
@pytest.mark.parametrize("offset", [1.8, -1.8])
def test_a_wrong_log_z_changes_nothing(scale: np.ndarray, offset: float) -> None:
    """It adds the same to every residual; with 1/|y| that would weigh the answers by their lengths: exp(-s offset).
    And long answers make exponents that overflow a plain exp."""
    of, r = drawn(scale, -(np.log(TARGET) - np.log(P)) / scale)
    off = Residuals(r.residual + offset, r.log_z + offset, r.scale)
    for name in ("target/kl", "target/total_variation", "target/sample_size"):
        assert distributions.metrics([of], off)[name] == pytest.approx(distributions.metrics([of], r)[name], rel=1e-9)
    huge = Residuals(r.residual, r.log_z, np.full(100, 8192.0))
    found = distributions.metrics([of], huge)
    assert all(math.isfinite(value) for value in found.values()) and found["target/sample_size"] < 0.5


def test_at_the_target_nothing_is_left() -> None:
    of, r = drawn(delta=np.zeros(OUTCOMES))
    found = distributions.metrics([of], r)
    assert found["target/kl"] == pytest.approx(0, abs=1e-12) and found["target/total_variation"] == pytest.approx(0)
    assert found["target/sample_size"] == pytest.approx(1)


def test_log_z_against_the_groups_own_and_the_exact() -> None:
    """The group's own is the log Z with which its residuals are 0 on average."""
    groups = [
        Watched("a", ["x", "y"], [1.0, 0.0], [True, False], [1, 2], exact_log_z=0.7),
        Watched("b", ["x", "x"], [1.0, 1.0], [True, True], [1, 2]),
    ]
    r = Residuals(np.array([0.1, 0.3, -0.2, 0.0]), np.array([0.5, 0.5, 0.9, 0.9]), np.ones(4))
    assert distributions.record(groups, r)["log_z"] == {
        "logged": [0.5, 0.9], "group": [0.3, 1.0], "exact": [0.7, None],
    }  # fmt: skip
    found = distributions.metrics(groups, r)
    assert found["loss/log_z_error"] == pytest.approx(0.2)
    assert found["diversity/answer_entropy"] == pytest.approx(math.log(2) / 2)
    without = distributions.metrics([groups[1]], Residuals(r.residual[2:], r.log_z[2:], r.scale[2:]))
    assert "loss/log_z_error" not in without


def test_of_several_updates_the_first_alone_counts() -> None:
    """Answers of later ones are nan: they are in no quantile, and their prompt in no figure of groups."""
    groups = [Watched(p, ["x", "y"], [1.0, 0.0], [True, False], [1, 1]) for p in "abc"]
    values = np.array([0.5, 0.7, 0.1, math.nan, math.nan, math.nan])
    r = Residuals(values, np.where(np.isnan(values), math.nan, 1.0), np.ones(6))
    found = distributions.metrics(groups, r)
    np.testing.assert_allclose(found["loss/residual_p50"], np.median([0.5, 0.7, 0.1]))
    record = distributions.record(groups, r)
    assert sum(record["residual"]["counts"]) == 3 and len(record["residual"]["edges"]) == 41
    assert record["log_z"]["logged"] == [1.0] and [of["prompt"] for of in record["prompts"]] == ["a"]
    json.dumps(record, allow_nan=False)


def test_without_residuals_and_by_kind() -> None:
    groups = [
        Watched("a", ["x", "y"], [1.0, 0.0], [True, False], [1, 3], kind="sums"),
        Watched("b", ["z", "z"], [0.5, 0.5], [False, False], [5, 7], kind="gcd"),
        Watched("c", ["z", "z"], [0.0, 0.0], [False, False], [5, 5], kind="gcd"),
    ]
    found = distributions.metrics(groups, None)
    assert not [name for name in found if name.startswith(("loss/", "target/"))]
    assert (found["kind/sums/reward"], found["kind/sums/length"]) == (0.5, 2.0)
    assert (found["kind/gcd/reward"], found["kind/gcd/length"]) == (0.25, 5.5)
    assert "target" not in distributions.record(groups, None)["prompts"][0]["answers"][0]
    assert "kind/gcd/entropy" not in found
    entropy = np.array([1.0, 2.0, 3.0, math.nan, 5.0, math.nan])
    found = distributions.metrics(groups, None, entropy)
    assert (found["kind/sums/entropy"], found["kind/gcd/entropy"]) == (1.5, 4.0), "of those that are known"
    assert not [name for name in distributions.metrics(groups[1:], None) if name.startswith("kind/")], "one kind"
