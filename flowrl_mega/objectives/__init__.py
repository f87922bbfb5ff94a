"""Training objectives: pure functions from per-token log-probs to a loss.

Adding one is one file: a subclass of `Objective` (settings as fields, `credit`, `loss`) that `objective.name` names as
"file.py:Class" or "module:Class", or one in this package that REGISTRY names. The trainer asks the objective what it
needs (`needs_reference`, `needs_critic`, `log_z`) and nothing else.
"""

from __future__ import annotations

import inspect
from difflib import get_close_matches
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.imports import load
from flowrl_mega.objectives.base import LossOutput, Objective
from flowrl_mega.objectives.cispo import CISPO
from flowrl_mega.objectives.flowrl import FlowRL
from flowrl_mega.objectives.gflowrl import GFlowRL
from flowrl_mega.objectives.grpo import GRPO
from flowrl_mega.objectives.gspo import GSPO
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.ppo import PPO
from flowrl_mega.objectives.reinforce_pp import ReinforcePP
from flowrl_mega.objectives.rloo import RLOO
from flowrl_mega.settings import refuse_unread, validated

__all__ = [
    "CISPO", "GRPO", "GSPO", "PPO", "REGISTRY", "RLOO", "FlowRL", "GFlowRL", "LossInputs", "LossOutput", "Objective",
    "ReinforcePP", "build",
]  # fmt: skip

REGISTRY: dict[str, type[Objective]] = {
    "flowrl": FlowRL,
    "gflowrl": GFlowRL,
    "grpo": GRPO,
    "gspo": GSPO,
    "ppo": PPO,
    "reinforce_pp": ReinforcePP,
    "cispo": CISPO,
    "rloo": RLOO,
}


def build(section: dict[str, Any]) -> Objective:
    """The objective that a config's `objective` section describes.

    Raises ConfigError for an unknown name, field or value, and for a field that nothing reads as the others are set;
    the message names it, the fix and the nearest known name.
    """
    known = f"{', '.join(REGISTRY)}, or a class of your own as file.py:Class or module:Class"
    if not isinstance(section, dict) or "name" not in section:
        raise ConfigError(f"objective.name: missing; set it to one of: {known}")
    name = str(section["name"])
    if ":" in name:
        kind, section = _own(name), {key: value for key, value in section.items() if key != "name"}
        if kind.model_fields["name"].is_required():
            section["name"] = name
    elif name in REGISTRY:
        kind = REGISTRY[name]
    else:
        near = get_close_matches(name.lower(), REGISTRY, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ConfigError(f"objective.name = {name!r}: no such objective; {hint}known: {known}")
    objective = validated(kind, section, "objective")
    refuse_unread(objective, kind.NEEDS, "objective")
    return objective


def _own(name: str) -> type[Objective]:
    """The class outside this package that "file.py:Class" or "module:Class" names."""
    kind = load(name, "objective.name")
    if not (inspect.isclass(kind) and issubclass(kind, Objective)):
        raise ConfigError(
            f"objective.name = {name!r}: is {kind!r:.100}; name a subclass of flowrl_mega.objectives.Objective"
        )
    if inspect.isabstract(kind):
        missing = " and ".join(sorted(kind.__abstractmethods__))
        raise ConfigError(f"objective.name = {name!r}: {kind.__name__} does not define {missing}; add what is missing")
    return kind
