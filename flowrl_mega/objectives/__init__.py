"""Training objectives: pure functions from per-token log-probs to a loss.

Adding one is one file and one line: subclass `Objective` in its own module (settings as fields, `credit`, `loss`),
then name it in REGISTRY. The trainer asks the objective what it needs (`needs_reference`, `needs_critic`, `log_z`) and
nothing else.
"""

from __future__ import annotations

from difflib import get_close_matches
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.objectives.base import LossOutput, Objective
from flowrl_mega.objectives.flowrl import FlowRL
from flowrl_mega.objectives.grpo import GRPO
from flowrl_mega.objectives.gspo import GSPO
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.ppo import PPO
from flowrl_mega.objectives.reinforce_pp import ReinforcePP
from flowrl_mega.settings import validated

__all__ = [
    "GRPO", "GSPO", "PPO", "REGISTRY", "FlowRL", "LossInputs", "LossOutput", "Objective", "ReinforcePP", "build",
]  # fmt: skip

REGISTRY: dict[str, type[Objective]] = {
    "flowrl": FlowRL,
    "grpo": GRPO,
    "gspo": GSPO,
    "ppo": PPO,
    "reinforce_pp": ReinforcePP,
}


def build(section: dict[str, Any]) -> Objective:
    """The objective that a config's `objective` section describes.

    Raises ConfigError for an unknown name, field or value; the message names it, the fix and the nearest known name.
    """
    known = ", ".join(REGISTRY)
    if not isinstance(section, dict) or "name" not in section:
        raise ConfigError(f"objective.name: missing; set it to one of: {known}")
    name = str(section["name"])
    if name not in REGISTRY:
        near = get_close_matches(name.lower(), REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"objective.name = {name!r}: no such objective; {hint}known: {known}")
    return validated(REGISTRY[name], section, "objective")
