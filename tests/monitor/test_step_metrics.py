"""From the reports of micro-batches on several ranks to one value a metric."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from rank_pool import RankPool

from flowrl_mega.config import ParallelSettings
from flowrl_mega.monitor.step_metrics import effective_sample_size, merge_updates, reduce_reports
from flowrl_mega.parallel import layout as layouts

# Two ranks with two micro-batches each, all of unequal sizes: log importance weights.
LOG_WEIGHTS = [[[0.3, -1.2, 2.0], [0.1]], [[-0.4, 0.9], [1.5, 0.0, -2.0, 0.7]]]


def report(log_weights: list[float]) -> dict[str, torch.Tensor]:
    x = torch.tensor(log_weights, dtype=torch.float64)
    metrics = {"is_weight": x.exp(), "is_weight_sq": (2 * x).exp(), "max_mismatch": x.abs()}
    return metrics | {"mismatch_abs_logp": x.abs(), "count": torch.tensor([len(x)])}


def reduced(plan: list[list[list[float]]]) -> dict[str, float]:
    """One rank's answer; `plan` is by rank and micro-batch."""
    layout = layouts.init(ParallelSettings(), seed=0)
    return reduce_reports([report(micro_batch) for micro_batch in plan[layout.rank]], layout.dp_group)


@pytest.mark.ranks
def test_sample_size_is_of_all_sequences_on_all_ranks(ranks2: RankPool) -> None:
    """Kish's (sum w)^2 / (n sum w^2) of the whole update; a mean of the ranks' own sizes would hide an answer that
    outweighs all others."""
    x = np.array([value for rank in LOG_WEIGHTS for micro_batch in rank for value in micro_batch])
    w = np.exp(x)
    kish = w.sum() ** 2 / (len(w) * (w**2).sum())
    by_rank = ranks2.run(reduced, LOG_WEIGHTS)
    assert by_rank[0] == by_rank[1]
    assert by_rank[0] == {
        "effective_sample_size": pytest.approx(kish, rel=1e-12),
        "max_mismatch": abs(x).max(),
        "mismatch_abs_logp": pytest.approx(abs(x).mean(), rel=1e-12),
    }


VALUES = [[[(1.0, 0.5), (0.0, 0.2)], [(2.0, 2.5)]], [[(-1.0, -0.1), (0.5, 0.5), (3.0, 1.0)], [(1.5, 1.0)]]]


def learnt(plan: list[list[list[tuple[float, float]]]]) -> dict[str, float]:
    """One rank's answer for a critic's (return, value) by rank and micro-batch, with a loss of 10 a token."""
    layout = layouts.init(ParallelSettings(), seed=0)
    reports = []
    for micro_batch in plan[layout.rank]:
        returns, values = torch.tensor(micro_batch, dtype=torch.float64).T
        error, tokens = returns - values, 3 * len(returns)
        reports.append(
            {"return": returns, "return_sq": returns**2, "value_error": error, "value_error_sq": error**2}
            | {"loss": torch.tensor([10.0 * tokens]), "loss_count": torch.tensor([tokens])}
            | {"count": torch.tensor([len(returns)])}
        )
    return reduce_reports(reports, layout.dp_group)


@pytest.mark.ranks
def test_explained_variance_and_a_loss_by_token_are_of_all_ranks(ranks2: RankPool) -> None:
    """1 - var(R - V) / var(R) over the whole update, by NumPy; and a loss is divided by what it was summed over."""
    returns, values = np.array([pair for rank in VALUES for batch in rank for pair in batch]).T
    for found in ranks2.run(learnt, VALUES):
        assert found == {
            "return": pytest.approx(returns.mean()),
            "explained_variance": pytest.approx(1 - (returns - values).var() / returns.var()),
            "loss": pytest.approx(10.0),
        }


@pytest.mark.parametrize("n", [1, 2, 1000])
def test_sample_size_at_its_ends(n: int) -> None:
    """All alike: everything counts, whatever the common weight. One outweighs the rest: one of n counts."""
    assert effective_sample_size(0.3, 0.3 * 0.3) == pytest.approx(1.0)
    assert effective_sample_size(1 / n, 1 / n) == pytest.approx(1 / n)


def test_updates_of_a_step_are_merged() -> None:
    """The worst token of a step is that of its worst update; shares are means."""
    updates = [{"effective_sample_size": 0.5, "max_mismatch": 3.0}, {"effective_sample_size": 1.0, "max_mismatch": 2.0}]
    assert merge_updates(updates) == {"effective_sample_size": 0.75, "max_mismatch": 3.0}
