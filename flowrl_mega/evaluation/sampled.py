"""Sampled evaluation: reward, share of right answers, best and pass of k, and how many different right answers."""

from __future__ import annotations

from collections.abc import Sequence


def sampled_metrics(
    responses: Sequence[str], rewards: Sequence[float], is_right: Sequence[bool], k: int
) -> dict[str, float]:
    """Figures of k answers to each prompt, prompt by prompt.

    reward and best@k are of rewards as training sees them: partial credit and the overlong penalty count. The others
    are of answers that are right by the reward's own threshold (`Score.right`), however long they are.
    """
    groups = [range(start, start + k) for start in range(0, len(rewards), k)]
    right = [{responses[i] for i in group if is_right[i]} for group in groups]
    return {
        "reward": sum(rewards) / len(rewards),
        f"best@{k}": sum(max(rewards[i] for i in group) for group in groups) / len(groups),
        "right": sum(is_right) / len(is_right),
        f"pass@{k}": sum(bool(answers) for answers in right) / len(groups),
        f"distinct_right@{k}": sum(len(answers) for answers in right) / len(groups),
    }
