"""What the trainer asks of an engine that writes answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy


@dataclass(frozen=True)
class Rollout:
    """One answer. `logp` are the engine's own, one a token, at the sampling temperature; the stop token is included."""

    response: list[int]
    logp: list[float]
    finish_reason: Literal["stop", "length"]
    weight_version: int


class Engine(Protocol):
    """Both calls are collective: every rank makes them with the same arguments and gets the same answers."""

    def sync(self, policy: Policy, version: int) -> None:
        """Take over the policy's weights; later answers carry `version`."""

    def generate(self, prompts: list[list[int]], answers: int, sampling: Sampling, seed: int) -> list[Rollout]:
        """`answers` answers to each prompt (token ids), prompt by prompt; the same seed gives the same answers."""
