"""Rewards of a step's answers, the work shared over all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rewards.registry import Reward, Score, refuse_all_failed, score_all


def score_shared(reward: Reward, rows: Sequence[dict[str, Any]], texts: Sequence[str], layout: Layout) -> list[Score]:
    """The scores of all answers, on every rank; each rank computes every world-th one. Collective."""
    mine = range(layout.rank, len(rows), layout.world)
    scores = score_all(reward, [rows[i] for i in mine], [texts[i] for i in mine])
    everyone = layout.gather_objects(scores)
    scores = [everyone[i % layout.world][i // layout.world] for i in range(len(rows))]
    refuse_all_failed(scores)
    return scores
