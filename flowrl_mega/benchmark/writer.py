"""What is to be written, and the protocol of whoever writes it."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, Protocol

import torch

from flowrl_mega.benchmark.answers import Answer, Place
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.engine import Rollout
from flowrl_mega.rollout.group_queue import derive_seed


class Work(NamedTuple):
    """What is wanted of one benchmark: the attempts that are missing at each problem, with its prompt."""

    benchmark: str
    prompts: list[Any]  # token ids, or for a chat server messages
    missing: list[list[int]]

    @property
    def places(self) -> list[Place]:
        return [Place(self.benchmark, i, attempt) for i, of in enumerate(self.missing) for attempt in of]


Stop = Callable[[], bool]
Done = Callable[[Place, Answer], None]  # called from any thread, on the one rank that has the answer


class Writer(Protocol):
    def write(self, work: Work, done: Done, stop: Stop) -> bool:
        """Write all that is missing; False where `stop` said so on any rank before that. Collective."""

    def close(self) -> None:
        """Stop what was started here."""


def dtype_of(config: EvalConfig) -> Literal["fp32", "bf16"]:
    said = config.model.dtype
    return said if said != "auto" else "bf16" if torch.cuda.is_available() else "fp32"


def sampling_of(config: EvalConfig, stop_ids: tuple[int, ...]) -> Sampling:
    rollout = config.rollout
    return Sampling(rollout.max_tokens, rollout.temperature, rollout.top_p, rollout.top_k, stop_ids)


def seed_of(seed: int, benchmark: str, *place: int) -> int:
    """A seed of its own for each benchmark and each place in it; a fixed sum, as hash() differs from process to
    process."""
    return derive_seed(seed, zlib.crc32(benchmark.encode()), *place)


def answer_of(rollout: Rollout, tokenizer: Any, sampling: Sampling) -> Answer:
    text = tokenizer.decode(rollout.response, skip_special_tokens=True)
    drawn = sampling.temperature > 0  # greedy answers are no sample of what the policy says
    nats = -sum(rollout.logp) if drawn and rollout.logp else None
    return Answer(text, len(rollout.response), rollout.finish_reason, None if nats is None else round(nats, 4))
