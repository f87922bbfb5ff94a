"""What k sampled answers to each problem say of a policy: pass@k, the majority's answer, and how sure a mean is."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from math import comb, nan

import numpy as np

DRAWN_AT_ONCE = 1 << 20  # problems drawn for the bootstrap in one array, so that memory does not grow with resamples


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that at least one of k answers is right, from n answers of which `right` are: unbiased for any n >= k.

    1 - C(n - right, k) / C(n, k), the estimator of Chen et al. 2021 (arXiv 2107.03374), in whole numbers and then one
    division, so the result is exact to the last bit.
    """
    if not 0 <= right <= n:
        raise ValueError(f"{right} right answers of {n}: must be between 0 and the number of answers")
    if not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} answers: k must be between 1 and the number of answers")
    ways = comb(n, k)
    return (ways - comb(n - right, k)) / ways


def maj(votes: Sequence[str | None], right: Sequence[bool]) -> float:
    """Whether the answer given most often is right, of one problem's attempts: 0, 1, or between where answers tie.

    `votes` are the attempts' final answers, in a form in which equal answers are equal texts; None, an answer that
    cannot be read, does not vote, and without any vote the result is 0. Tied answers share: the result is the mean over
    them. An answer is as right as its voters are: where they disagree, the share of them that is right.
    """
    by_answer: defaultdict[str, list[bool]] = defaultdict(list)
    for vote, is_right in zip(votes, right, strict=True):
        if vote is not None:
            by_answer[vote].append(bool(is_right))
    most = max(map(len, by_answer.values()), default=0)
    tied = [sum(voters) / most for voters in by_answer.values() if len(voters) == most]
    return sum(tied) / len(tied) if tied else 0.0


def powers(k: int) -> list[int]:
    """1, 2, 4 and so on below k, and k itself: the numbers of answers that pass@k is shown for."""
    if k < 1:
        raise ValueError(f"k = {k}: must be at least 1")
    return [2**power for power in range((k - 1).bit_length())] + [k]


def interval(
    per_problem: Sequence[float], seed: int = 0, resamples: int = 10_000, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap's interval of the mean over problems (Efron 1979), the same for the same arguments.

    Problems are drawn, not answers: it says how far other problems of the kind would give another mean. Fewer than two
    problems say nothing of that: (nan, nan). Problems that all have one value give an interval without width, which is
    what the bootstrap says and not certainty.
    """
    if resamples < 1 or not 0 < level < 1:
        raise ValueError(f"resamples = {resamples}, level = {level}: must be at least 1, and between 0 and 1")
    values = np.asarray(per_problem, dtype=np.float64)
    if len(values) < 2:
        return nan, nan
    draw = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // len(values))
    means = [
        values[draw.integers(len(values), size=(min(rows, resamples - done), len(values)))].mean(axis=1)
        for done in range(0, resamples, rows)
    ]
    low, high = np.quantile(np.concatenate(means), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
