"""Sampled evaluation: reward, best of k, and how many different rewarded answers there are."""

from __future__ import annotations

from collections.abc import Sequence

from flowrl_mega.rewards.registry import Score


def held_out_metrics(responses: Sequence[str], scores: Sequence[Score], k: int) -> dict[str, float]:
    """Of k answers to each prompt, prompt by prompt. An answer counts as right where its reward is above 0."""
    groups = [range(start, start + k) for start in range(0, len(scores), k)]
    right = [{responses[i] for i in group if scores[i].reward > 0} for group in groups]
    return {
        "reward": sum(score.reward for score in scores) / len(scores),
        f"best@{k}": sum(max(scores[i].reward for i in group) for group in groups) / len(groups),
        f"pass@{k}": sum(bool(answers) for answers in right) / len(groups),
        f"distinct_right@{k}": sum(len(answers) for answers in right) / len(groups),
    }
