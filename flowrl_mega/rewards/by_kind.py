"""One reward for data of several tasks: each row's `kind` names the reward that grades it."""

from __future__ import annotations

import difflib
from collections.abc import Set
from functools import cache
from typing import Any

from flowrl_mega.config import ConfigError, RewardSettings
from flowrl_mega.rewards.load import Result, Reward, bound

KINDS = {
    "math": "flowrl_mega.rewards.math:verify",
    "math_dapo": "flowrl_mega.rewards.math:dapo",
    "code": "flowrl_mega.rewards.code:score",
    "reasoning_gym": "flowrl_mega.rewards.reasoning_gym:score",
    "sums": "flowrl_mega.rewards.sums:score",
}


DEFAULT = RewardSettings(function="flowrl_mega.rewards.by_kind:score")


def score(row: dict[str, Any], response: str, settings: RewardSettings = DEFAULT) -> Result:
    """What the reward that `row["kind"]` names gives; rows of other kinds are refused at the start, by `describe`."""
    return _reward(row["kind"], settings)(row, response)


score.right_at = 1.0  # type: ignore[attr-defined]  # that of each of them


def _wrong(row: dict[str, Any]) -> float:
    """What a failed call scores: -1 where DAPO's rule grades, or an answer that breaks it would beat a wrong one."""
    return _reward(row["kind"], DEFAULT).of_failed(row)


score.wrong = _wrong  # type: ignore[attr-defined]


def describe(settings: RewardSettings, kinds: Set[str], modules: Set[str] = frozenset()) -> str:
    """What the rewards of these kinds of rows say of themselves. Raises ConfigError for a kind that has no reward."""
    for kind in sorted(kinds):
        if kind not in KINDS:
            near = difflib.get_close_matches(kind, KINDS, n=1)
            found = f"is of the kind {kind!r}" if kind else "has no 'kind'"
            raise ConfigError(
                f"reward.function = flowrl_mega.rewards.by_kind:score: a row of the data {found}; give each row one of "
                f"{', '.join(KINDS)}" + (f" (did you mean {near[0]!r}?)" if near else "")
            )
    said = {kind: _reward(kind, settings).describe({kind}, modules) for kind in sorted(kinds)}
    return "; ".join(f"{kind}: {words}" for kind, words in said.items() if words)


@cache
def _reward(kind: str, settings: RewardSettings) -> Reward:
    return bound(settings.model_copy(update={"function": KINDS[kind]}))
