"""How far the engine that wrote the answers was from the policy that learns from them."""

from __future__ import annotations

from flowrl_mega.config import MismatchSettings
from flowrl_mega.rollout.engine import Rollout


def staleness(rollouts: list[Rollout], version: int) -> dict[str, float]:
    """How many updates the weights that made the tokens are behind `version`: mean over tokens, and the largest."""
    spans = [(version - made_by, n) for rollout in rollouts for made_by, n in rollout.versions]
    tokens = sum(n for _, n in spans)
    mean = sum(behind * n for behind, n in spans) / tokens
    return {"mismatch/staleness": mean, "mismatch/max_staleness": float(max(behind for behind, _ in spans))}


def beyond_budget(found: float | None, settings: MismatchSettings, step: int) -> str | None:
    """What is wrong where mean |engine - trainer| log-prob per token, in nats, exceeds the budget; else None."""
    if settings.budget is None or found is None or found <= settings.budget:
        return None
    return (
        f"step {step}: mean |engine - trainer| log-prob {found:.3g} nats a token is beyond "
        f"rollout.mismatch.budget = {settings.budget:g}"
    )
