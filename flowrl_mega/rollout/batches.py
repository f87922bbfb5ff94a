"""Which prompts are answered when: ahead of time, in parts, or more of them than a step needs.

A step takes groups (a prompt and its answers) that are complete and kept, the oldest first. With `ahead` its first
round is under way while the step before trains. With `partial_tokens` an answer writes at most so many tokens a round
and goes on in the next one, later steps included; with `oversample` a round has more groups than a step takes, so that
few wait for long answers. What is answered and not yet taken is carried to the next step, and is in the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from flowrl_mega.config import RolloutSettings, RunError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.engine import Engine, Request, Rollout

KEPT = ("place", "index", "prompt", "rollouts")  # of a group, in a checkpoint
MOST_ROUNDS = 64  # in one step; more means that no prompt gives what is asked for


@dataclass
class Group:
    """A prompt and its answers; `place` is that of the prompt in the endless stream, `index` that in the data set."""

    place: int
    index: int
    prompt: list[int]
    rollouts: list[Rollout] = field(default_factory=list)  # empty before the first round
    texts: list[str] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)  # the trainer's, of a complete group

    @property
    def is_uniform(self) -> bool:
        return len({score.reward for score in self.scores}) == 1


class Stream(Protocol):
    """The endless stream of prompts. All methods are collective, and give every rank the same."""

    position: int  # of the next prompt

    def next(self, n: int) -> list[tuple[int, list[int]]]:
        """(index in the data set, token ids) of the next `n` prompts."""

    def state_dict(self) -> dict[str, Any]:
        """{"place": the position, ...}: plain values, the same on every rank."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict()`."""


@dataclass
class _Round:
    """What the engine is working on."""

    job: Any
    groups: list[Group]
    asked: list[tuple[Group, int | None]]  # by request: the answer that goes on, or None for all of a new group
    position: dict[str, Any]  # the stream's state after this round's prompts


class Batches:
    """Groups for each step, of prompts from `stream`. All methods are collective.

    `answered` is told of each answer as soon as it is complete, with its group and its number, where `Engine` tells.
    """

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        settings: RolloutSettings,
        sampling: Sampling,
        seed: int,
        answered: Callable[[Group, int, Rollout], None] | None = None,
    ) -> None:
        self.engine, self.stream, self.settings = engine, stream, settings
        self.sampling, self.seed, self.answered = sampling, seed, answered
        self.position = stream.state_dict()  # before the prompts of a round under way
        self.ready: list[Group] = []  # complete, scored and kept
        self.unfinished: list[Group] = []  # with answers that go on, or complete but not scored
        self.rounds = 0  # of the step that is being filled
        self.dropped = 0
        self.pending: _Round | None = None

    @property
    def has_enough(self) -> bool:
        return len(self.ready) >= self.settings.prompts_per_step

    def start(self, step: int) -> None:
        """Let the engine begin the next round for `step`; nothing is remembered of it before `answer`."""
        wanted = math.ceil(self.settings.prompts_per_step * self.settings.oversample)
        new = max(0, wanted - len(self.ready) - len(self.unfinished))
        place = self.stream.position
        fresh = [Group(place + i, index, ids) for i, (index, ids) in enumerate(self.stream.next(new))]
        groups = [*self.unfinished, *fresh]
        asked = [(group, i) for group in groups for i in self._open(group)]
        requests = [self._request(group, i) for group, i in asked]
        # A round's seed is its own, so that a resumed run draws what the uninterrupted one would have drawn.
        seed = derive_seed(self.seed, step, *([self.rounds] if self.rounds else []))
        told = partial(self._tell, asked) if self.answered else None
        job = self.engine.start(requests, self.sampling, seed, told) if requests else None
        self.pending = _Round(job, groups, asked, self.stream.state_dict())

    def answer(self, step: int) -> list[Group]:
        """Finish a round: the groups that are complete now, for the trainer to score and to give to `keep`."""
        if self.rounds >= MOST_ROUNDS:
            raise RunError(
                f"rollout.drop_uniform: step {step} has {len(self.ready)} of {self.settings.prompts_per_step} groups "
                f"after {self.rounds} rounds, {self.dropped} were uniform; the prompts are too easy or too hard for "
                "this policy: take others, or set rollout.drop_uniform=false"
            )
        if self.pending is None:
            self.start(step)
        assert self.pending is not None
        pending, self.pending = self.pending, None
        answered = self.engine.finish(pending.job) if pending.asked else []
        self.rounds += 1
        self.position = pending.position
        for (group, i), rollouts in zip(pending.asked, answered, strict=True):
            if i is None:
                group.rollouts = rollouts
            else:
                group.rollouts[i] = group.rollouts[i].followed_by(rollouts[0])
        self.unfinished = [group for group in pending.groups if self._open(group)]
        return [group for group in pending.groups if not self._open(group)]

    def keep(self, groups: list[Group]) -> None:
        """Scored groups: those that `drop_uniform` does not leave out may be trained on."""
        kept = [group for group in groups if not (self.settings.drop_uniform and group.is_uniform)]
        self.dropped += len(groups) - len(kept)
        self.ready = sorted([*self.ready, *kept], key=lambda group: group.place)

    def take(self) -> tuple[list[Group], dict[str, float]]:
        """The step's groups, and what they cost."""
        n = self.settings.prompts_per_step
        taken, self.ready = self.ready[:n], self.ready[n:]
        carried = len(self.ready) + len(self.unfinished)
        counts = {"rounds": self.rounds, "carried_groups": carried, "uniform_dropped": self.dropped}
        self.rounds = self.dropped = 0
        return taken, {f"rollout/{name}": float(value) for name, value in counts.items()}

    def state(self) -> dict[str, Any]:
        """What a checkpoint must hold; a round under way is not in it and will be asked for again."""
        groups = sorted([*self.ready, *self.unfinished], key=lambda group: group.place)
        carried = [{**vars(g), "rollouts": [asdict(rollout) for rollout in g.rollouts]} for g in groups]
        return {"stream": self.position, "groups": [{name: g[name] for name in KEPT} for g in carried]}

    def load(self, state: dict[str, Any]) -> None:
        """Go on from `state()`. Complete groups come back with the next round, to be scored again."""
        groups = [
            {**saved, "rollouts": [Rollout(**rollout) for rollout in saved["rollouts"]]} for saved in state["groups"]
        ]
        # Checkpoints of before there were prompt stores know prompts by their places alone.
        self.unfinished = [
            Group(**(group if "index" in group else group | self._found(group["place"]))) for group in groups
        ]
        self.position = state.get("stream") or {"place": state["cursor"]}
        self.stream.load_state_dict(self.position)

    def _found(self, place: int) -> dict[str, Any]:
        """The prompt at a place of the stream, which is left behind it."""
        self.stream.load_state_dict({"place": place})
        ((index, prompt),) = self.stream.next(1)
        return {"index": index, "prompt": prompt}

    def _open(self, group: Group) -> list[int | None]:
        """The answers that go on; [None] for a group that has none yet."""
        if not group.rollouts:
            return [None]
        return [i for i, rollout in enumerate(group.rollouts) if self._goes_on(rollout)]

    def _goes_on(self, rollout: Rollout) -> bool:
        return rollout.finish_reason == "length" and len(rollout.response) < self.sampling.max_tokens

    def _tell(self, asked: list[tuple[Group, int | None]], request: int, i: int, rollout: Rollout) -> None:
        """An engine's `Answered`, of a round that asked for this."""
        assert self.answered
        group, going_on = asked[request]
        if going_on is not None:
            i, rollout = going_on, group.rollouts[going_on].followed_by(rollout)
        if not self._goes_on(rollout):
            self.answered(group, i, rollout)

    def _request(self, group: Group, i: int | None) -> Request:
        most = self.settings.partial_tokens or self.sampling.max_tokens
        if i is None:
            return Request(group.prompt, self.settings.group_size, min(most, self.sampling.max_tokens))
        so_far = group.rollouts[i].response
        return Request([*group.prompt, *so_far], 1, min(most, self.sampling.max_tokens - len(so_far)))


def derive_seed(*numbers: int) -> int:
    """An own seed for each step, so that nothing random has to be remembered between steps."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
