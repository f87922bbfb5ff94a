"""Settings that moved: an old name is refused with the new one, and the config.yaml of an earlier run is translated."""

from __future__ import annotations

from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.settings import flat

MOVED = {"rewards.math_timeout_s": "reward.math.timeout_s", "rewards": "reward"}  # sections with all that is in them
MOVED_FUNCTIONS = {"flowrl_mega.rewards.tasks:score": "flowrl_mega.rewards.by_kind:score"}

REWARDS = {"workers", "timeout_s", "math_timeout_s", "overlong", "code"}
SECTIONS = {
    "model", "megatron", "ops", "parallel", "data", "reward", "rewards", "rollout", "objective", "optimizer", "critic",
    "batch", "checkpoint", "evaluation", "monitor",
}  # fmt: skip


def is_earlier_run(tree: dict[str, Any]) -> bool:
    """Whether a trainer wrote this config.yaml when `reward` was a string beside the section `rewards`.

    A file that a person wrote does not have every section, and every field of `rewards`.
    """
    rewards = tree.get("rewards")
    return (
        tree.keys() >= SECTIONS
        and isinstance(tree["reward"], str)
        and isinstance(rewards, dict)
        and rewards.keys() == REWARDS
    )


def translated(tree: dict[str, Any]) -> dict[str, Any]:
    """An earlier run's settings under today's names."""
    rewards, function = tree["rewards"], tree["reward"]
    reward = {
        "function": MOVED_FUNCTIONS.get(function, function),
        "math": {"timeout_s": rewards["math_timeout_s"]},
        **{name: rewards[name] for name in ("workers", "timeout_s", "overlong", "code")},
    }
    return {name: value for name, value in tree.items() if name != "rewards"} | {"reward": reward}


def refuse_moved(tree: dict[str, Any]) -> None:
    """Raises ConfigError with the new name of every setting that has an old one."""
    faults = []
    for name, value in flat(tree).items():
        old = next((old for old in MOVED if f"{name}.".startswith(f"{old}.")), None)
        if old:
            faults.append(f"{name}: is now {MOVED[old]}{name.removeprefix(old)}")
        elif name == "reward.function" and value in MOVED_FUNCTIONS:
            faults.append(f"{name} = {value!r}: is now {MOVED_FUNCTIONS[value]!r}")
    if faults:
        raise ConfigError("\n".join(faults))
