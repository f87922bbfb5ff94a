"""The protocol between the trainer and an engine that generates answers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol

from flowrl_mega.config import Config
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel.layout import Layout


@dataclass(frozen=True)
class Request:
    """Asks for `answers` answers to one prompt (token ids). A continued answer has its earlier tokens at the end."""

    prompt: list[int]
    answers: int
    max_tokens: int  # most new tokens, the stop token included


@dataclass(frozen=True)
class Rollout:
    """One answer: its tokens, the stop token included, and the engine's log-prob of each at the sampling temperature.

    An engine that knows no log-probs leaves `logp` empty.
    """

    response: list[int]
    logp: list[float]
    finish_reason: Literal["stop", "length"]
    versions: list[tuple[int, int]]  # (version of the weights, number of tokens they generated), in order

    def followed_by(self, other: Rollout) -> Rollout:
        """This unfinished answer joined with its continuation."""
        return Rollout(
            self.response + other.response,
            self.logp + other.logp,
            other.finish_reason,
            self.versions + other.versions,
        )


# Called with (index of the request, index of the answer, the answer) when an answer is complete, on the one rank that
# has it, and from any thread.
AnswerCallback = Callable[[int, int, Rollout], None]


class Engine(Protocol):
    """All methods are collective: every rank calls them with the same arguments and gets the same results.

    `rollout.engine: module:Class` or `path/to/file.py:Class` names an implementation outside this package; its
    constructor takes one argument, an EngineSetup.
    """

    def sync(self, policy: Policy, version: int) -> dict[str, float]:
        """Load the policy's weights; tokens generated from now on carry `version`. Answers in progress continue.

        Called once before the first step, with the last finished step (0), and after each step. Returns metrics.
        """

    def start(
        self, requests: list[Request], sampling: Sampling, seed: int, on_answer: AnswerCallback | None = None
    ) -> Any:
        """Begin a job and return it for `finish`. `max_tokens` comes from each request, not from `sampling`."""

    def finish(self, job: Any) -> list[list[Rollout]]:
        """Wait for a job; its answers, one list per request. A seeded engine gives the same answers for a seed."""

    def release(self) -> None:
        """Free memory for the trainer until the next `sync`, where both share a device. No job may be in progress."""

    def metrics(self) -> dict[str, float]:
        """Counters since the last call (retries, restarts, ...), added to the step's metrics."""

    def close(self) -> None:
        """Stop everything that the engine started."""


ENGINE_METHODS = ("sync", "start", "finish", "release", "metrics", "close")


class EngineSetup(NamedTuple):
    """An engine's constructor argument, the same on all ranks. Engines are built collectively."""

    config: Config
    layout: Layout
    arch: Architecture
    side_files: dict[str, bytes]  # config and tokenizer files of the model, by file name


def generate(
    engine: Engine, prompts: list[list[int]], answers: int, sampling: Sampling, seed: int
) -> list[list[Rollout]]:
    """`answers` answers of at most `sampling.max_tokens` tokens to each prompt, one list per prompt. Collective."""
    requests = [Request(prompt, answers, sampling.max_tokens) for prompt in prompts]
    return engine.finish(engine.start(requests, sampling, seed))
