"""From the reports of micro-batches on several ranks to one value a metric."""

from __future__ import annotations

from collections.abc import Callable
from operator import truediv

import numpy as np
import pytest
import torch
from rank_pool import RankPool

from flowrl_mega.config import ParallelSettings
from flowrl_mega.metrics import FromMeans, GroupGap, Max, Mean, Report
from flowrl_mega.monitor import step_metrics
from flowrl_mega.monitor.step_metrics import merge_updates, reduce_reports
from flowrl_mega.objectives.base import effective_sample_size
from flowrl_mega.objectives.ppo import explained_variance
from flowrl_mega.parallel import layout as layouts

# Two ranks with two micro-batches each, all of unequal sizes: log importance weights.
LOG_WEIGHTS = [[[0.3, -1.2, 2.0], [0.1]], [[-0.4, 0.9], [1.5, 0.0, -2.0, 0.7]]]
ALL_LOG_WEIGHTS = np.array([value for rank in LOG_WEIGHTS for micro_batch in rank for value in micro_batch])


def weights(log_weights: list[float]) -> Report:
    x = torch.tensor(log_weights, dtype=torch.float64)
    return {
        "size": FromMeans(effective_sample_size, Mean(x.exp()), Mean((2 * x).exp())),
        "largest": Max(x),
        "mean": Mean(x),
    }


def signs(log_weights: list[float]) -> Report:
    """As `weights`, of numbers whose largest is below 0."""
    return weights([-3 + x for x in log_weights])


def only_means(log_weights: list[float]) -> Report:
    return {"mean": Mean(torch.tensor(log_weights))}


VALUES = [[[(1.0, 0.5), (0.0, 0.2)], [(2.0, 2.5)]], [[(-1.0, -0.1), (0.5, 0.5), (3.0, 1.0)], [(1.5, 1.0)]]]


def critic(pairs: list[tuple[float, float]]) -> Report:
    """For a critic's (return, value); the loss is 10 at each of the micro-batch's tokens, three an answer."""
    returns, values = torch.tensor(pairs, dtype=torch.float64).T
    error, n = returns - values, len(pairs)
    moments = [Mean(x) for x in (returns, returns**2, error, error**2)]
    loss = FromMeans(truediv, Mean(torch.tensor(30.0 * n), n), Mean(torch.tensor(3 * n), n))
    return {"return": moments[0], "explained": FromMeans(explained_variance, *moments), "loss": loss}


def reduced(make: Callable[[list], Report], plan: list[list[list]]) -> dict[str, tuple[str, float]]:
    """One rank's answer, the type and the number of each metric; `plan` is by rank and micro-batch."""
    layout = layouts.init(ParallelSettings(), seed=0)
    metrics = reduce_reports([make(micro_batch) for micro_batch in plan[layout.rank]], layout.dp_group)
    return {name: (type(metric).__name__, float(metric.values)) for name, metric in metrics.items()}


@pytest.mark.ranks
@pytest.mark.parametrize(("make", "shift"), [(weights, 0.0), (signs, -3.0)])
def test_sample_size_is_of_all_sequences_on_all_ranks(make, shift, ranks2: RankPool) -> None:
    """Kish's (sum w)^2 / (n sum w^2) of the whole update; a mean of the ranks' own sizes would hide an answer that
    outweighs all others. A maximum is not pulled up to 0, and a mean is over sequences, not over micro-batches."""
    x = ALL_LOG_WEIGHTS + shift
    w = np.exp(x)
    kish = w.sum() ** 2 / (len(w) * (w**2).sum())
    by_rank = ranks2.run(reduced, make, LOG_WEIGHTS)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0] == {
        "size": ("Mean", pytest.approx(kish, rel=1e-12)),
        "largest": ("Max", x.max()),
        "mean": ("Mean", pytest.approx(x.mean(), rel=1e-12)),
    }


@pytest.mark.ranks
def test_explained_variance_and_a_loss_by_token_are_of_all_ranks(ranks2: RankPool) -> None:
    """1 - var(R - V) / var(R) over the whole update, by NumPy; and a loss is divided by what it was summed over."""
    returns, values = np.array([pair for rank in VALUES for batch in rank for pair in batch]).T
    for found in ranks2.run(reduced, critic, VALUES):
        assert found == {
            "return": ("Mean", pytest.approx(returns.mean())),
            "explained": ("Mean", pytest.approx(1 - (returns - values).var() / returns.var())),
            "loss": ("Mean", pytest.approx(10.0)),
        }


# (prompt, value) of answers; prompt 2 has none in this update, and 1 and 3 have theirs on both ranks.
BY_PROMPT = [[[(1, 2.0), (0, -0.5)], [(3, -4.0)]], [[(1, -1.0), (3, 1.0), (3, 0.5)], [(0, -2.5), (1, 5.0)]]]


def gaps(pairs: list[tuple[int, float]]) -> Report:
    prompts, values = zip(*pairs, strict=True)
    return {"gap": GroupGap(torch.tensor(values), torch.tensor(prompts), 5), "mean": Mean(torch.tensor(values))}


@pytest.mark.ranks
def test_a_gap_is_of_whole_groups(ranks2: RankPool) -> None:
    """Of each prompt's answers on all ranks together: by micro-batch or by rank their noise would not average out."""
    answers = [pair for rank in BY_PROMPT for batch in rank for pair in batch]
    means = [np.mean([value for prompt, value in answers if prompt == own]) for own in (0, 1, 3)]
    for found in ranks2.run(reduced, gaps, BY_PROMPT):
        assert found["gap"] == ("Mean", pytest.approx(np.abs(means).mean(), rel=1e-12))
        assert found["mean"] == ("Mean", pytest.approx(np.mean([value for _, value in answers]), rel=1e-6))


@pytest.mark.ranks
def test_one_rank_alone_and_a_report_without_maxima(ranks1: RankPool) -> None:
    """An objective of one's own may log a single float32 mean."""
    (found,) = ranks1.run(reduced, only_means, LOG_WEIGHTS[:1])
    assert found == {"mean": ("Mean", pytest.approx(np.mean([0.3, -1.2, 2.0, 0.1]), rel=1e-6))}


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_sample_size_at_its_ends(n: int) -> None:
    """All alike: everything counts, whatever the common weight. One outweighs the rest: one of n counts."""
    assert effective_sample_size(0.3, 0.3 * 0.3) == pytest.approx(1.0)
    assert effective_sample_size(1 / n, 1 / n) == pytest.approx(1 / n)


def test_a_critic_of_equal_returns_explains_nothing() -> None:
    """There is no variance to explain, and nothing to divide by."""
    assert explained_variance(0.5, 0.25, 0.1, 0.02) == 0.0


def test_updates_of_a_step_are_merged() -> None:
    """The worst token of a step is that of its worst update, and a counter does not fall; the rest are means, over the
    updates that have them: while a critic warms up the policy has none."""
    updates = [
        {"share": Mean(0.5), "largest": Max(-3.0), "skipped": Max(1)},
        {"share": Mean(1.0), "largest": Max(-4.0), "skipped": Max(2), "late": Mean(0.1)},
    ]
    assert merge_updates(updates) == {"share": 0.75, "largest": -3.0, "skipped": 2.0, "late": 0.1}


def test_a_metric_keeps_its_digits_and_no_graph() -> None:
    """Numbers are float64, as Python's; a graph that is held would hold the activations of every micro-batch."""
    assert merge_updates([{"x": Mean(0.1)}]) == {"x": 0.1}
    weight = torch.ones(2, requires_grad=True)
    for metric in (Mean(2 * weight), Max(2 * weight)):
        assert not metric.values.requires_grad


def test_utilisation_is_the_share_of_the_peak():
    """A GPU that did 989e12 operations in each of two seconds, six a parameter and token, was at its peak."""
    tokens = 2 * 989e12 / (6 * 7e9)
    (found,) = step_metrics.utilisation(7_000_000_000, int(tokens), 2.0, 1, "NVIDIA H100 80GB HBM3").values()
    assert found == pytest.approx(1.0, rel=1e-5)
    (half,) = step_metrics.utilisation(7_000_000_000, int(tokens), 2.0, 2, "NVIDIA H200").values()
    assert half == pytest.approx(0.5, rel=1e-5)
    assert step_metrics.utilisation(7, 7, 2.0, 1, "NVIDIA GeForce RTX 4090") == {}, "its peak is not known here"
    assert step_metrics.utilisation(7, 7, 0.0, 1, "NVIDIA H100") == {}, "no update was made"
