"""What ranks run to see how many logits the head may keep, update by update."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from on_ranks import start

from flowrl_mega.metrics import Max, Mean
from flowrl_mega.model.logits_budget import Memory

SECTIONS: dict[str, Any] = {
    "rollout": {"prompts_per_step": 4, "group_size": 4},
    "batch": {"mini_batch": 8, "tokens_per_microbatch": 40},
}


def budgets(path: Path, memories: list[Memory] | None, setting: int | str = "auto") -> list[int]:
    """Bytes before and after each of two updates of a step, and after those of another; `memories`: each rank's, told
    to it as if it had a GPU."""
    run = start(path, model={"path": str(path), "logits_budget_mb": setting}, steps=2, **SECTIONS)
    models, real = run.models, run.trainer.update
    if memories is not None:
        models.logits_budget.memory = lambda: memories[run.layout.rank]
    found = [models.policy.logits_budget_bytes]

    def update(mini_batch: list[Any]) -> dict[str, Mean | Max]:
        metrics = real(mini_batch)
        found.append(models.policy.logits_budget_bytes)
        return metrics

    run.trainer.update = update  # type: ignore[method-assign]
    for _ in range(2):
        run.trainer.step()
    return found
