"""Sampled evaluation: reward, best of k, and how many different rewarded answers there are."""

from __future__ import annotations

from collections.abc import Sequence


def sampled_metrics(responses: Sequence[str], rewards: Sequence[float], k: int) -> dict[str, float]:
    """Of k answers to each prompt, prompt by prompt. An answer counts as right where its reward is above 0."""
    groups = [range(start, start + k) for start in range(0, len(rewards), k)]
    right = [{responses[i] for i in group if rewards[i] > 0} for group in groups]
    return {
        "reward": sum(rewards) / len(rewards),
        f"best@{k}": sum(max(rewards[i] for i in group) for group in groups) / len(groups),
        f"pass@{k}": sum(bool(answers) for answers in right) / len(groups),
        f"distinct_right@{k}": sum(len(answers) for answers in right) / len(groups),
    }
