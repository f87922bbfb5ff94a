"""The queue of prompt groups between the engine and the trainer: started early, continued, oversampled, filtered.

A step takes groups (a prompt and its answers) that are complete and accepted, the oldest first. With `rollout.ahead`
the first rounds of so many steps to come are begun before this step trains: an engine behind servers generates
meanwhile, one that generates when it is asked (`at_once`) does so now, with the weights of now, and the answers are
kept, also by the checkpoint. With `partial_tokens` an answer gets at most so many
tokens per round and continues in the next one, in later steps if need be; with `oversample` a round has more groups
than a step takes, so that few steps wait for long answers. Answered groups that are not taken are carried to the next
step, and are part of the checkpoint. With `replay` a share of a step's groups are taken again from earlier steps, with
the log-probs of who wrote them.
"""

from __future__ import annotations

import math
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any, Protocol

import numpy as np

from flowrl_mega.config import RolloutSettings, RunError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.engine import Engine, Request, Rollout

REPLAY = 1 << 20  # sets the choice of replayed groups apart from rounds, which count from 0
MOST_ROUNDS = 64  # in one step; more means that no prompt passes rollout.drop_uniform


@dataclass
class Group:
    """A prompt and its answers."""

    position: int  # of the prompt in the endless stream
    index: int  # of the prompt in the data set
    prompt: list[int]
    rollouts: list[Rollout] = field(default_factory=list)  # empty before the first round
    texts: list[str] = field(default_factory=list)
    scores: list[Any] = field(default_factory=list)  # set by the trainer once the group is complete

    @property
    def oldest_version(self) -> int:
        """Of the weights that wrote any of its tokens."""
        return min(version for rollout in self.rollouts for version, _ in rollout.versions)

    @property
    def is_uniform(self) -> bool:
        """Whether all answers have the same reward."""
        return len({score.reward for score in self.scores}) == 1


class Stream(Protocol):
    """The endless stream of prompts. All methods are collective, and return the same on every rank."""

    position: int  # of the next prompt

    def next(self, n: int) -> list[tuple[int, list[int]]]:
        """(index in the data set, token ids) of the next `n` prompts."""

    def state_dict(self) -> dict[str, Any]:
        """The state from which `load_state_dict` continues."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`."""


@dataclass
class _Round:
    """A round in progress."""

    job: Any
    groups: list[Group]
    asked: list[tuple[Group, int | None]]  # per request: the answer to continue, or None for all of a new group
    stream_state: dict[str, Any]  # after this round's prompts
    step: int | None = None  # that it was begun for; None: carried over from before a resume


class GroupQueue:
    """Groups for each step, with prompts from `stream`. All methods are collective.

    `at_once`: the engine generates in `finish`, so that a round begun ahead is finished at once. `on_answer` is called
    with (group, index of the answer, answer) as soon as an answer is complete, as AnswerCallback.
    """

    def __init__(
        self,
        engine: Engine,
        stream: Stream,
        settings: RolloutSettings,
        sampling: Sampling,
        seed: int,
        on_answer: Callable[[Group, int, Rollout], None] | None = None,
        at_once: bool = False,
    ) -> None:
        self.engine, self.stream, self.settings = engine, stream, settings
        self.sampling, self.seed, self.on_answer, self.at_once = sampling, seed, on_answer, at_once
        self.stream_state = stream.state_dict()  # before the prompts of a round in progress
        self.ready: list[Group] = []  # complete, scored and accepted
        self.unfinished: list[Group] = []  # with answers to continue, or complete but not scored
        self.rounds = 0  # finished for the step that is being filled
        self.dropped = self.too_old = 0  # groups of this step: uniform ones, and those beyond max_staleness
        self.step = 0  # that is being filled
        self.kept: deque[Group] = deque(maxlen=settings.replay.size if settings.replay else 0)
        self.replayed: list[Group] = []  # of this step
        self.pending: deque[_Round] = deque()
        self.begun = Counter[int]()  # rounds by the step that they were begun for

    @property
    def has_enough(self) -> bool:
        """Whether a step's groups can be taken."""
        return len(self.ready) >= self.settings.prompts_per_step - len(self.replayed)

    def begin_step(self, step: int) -> None:
        """From here on groups are for this step: carried ones that are too old by now are dropped."""
        self.step = step
        self.ready = self._fresh(self.ready)
        young = [group for group in self.kept if self._is_fresh(group)]
        count = min(self.settings.replayed, len(young))
        chosen = np.random.default_rng(derive_seed(self.seed, step, REPLAY)).choice(len(young), count, replace=False)
        self.replayed = [young[i] for i in sorted(chosen)]

    def start_ahead(self, step: int, last: int) -> None:
        """With `step`'s groups taken, begin the rounds of the `rollout.ahead` steps after it, up to the `last`."""
        newest = max(self.begun, default=step)
        self.begun = Counter({begun: rounds for begun, rounds in self.begun.items() if begun > step})
        for later in range(max(step, newest) + 1, min(step + self.settings.ahead, last) + 1):
            self.start_round(later)
            if self.at_once:
                self._answer(self.pending[-1])

    def start_round(self, step: int) -> None:
        """Submit the next round for `step` to the engine; it is part of state_dict() only once it is answered."""
        fresh_ones = self.settings.prompts_per_step - (self.settings.replayed if step > 1 else 0)
        wanted = math.ceil(fresh_ones * self.settings.oversample)
        new = max(0, wanted - len(self.ready) - len(self.unfinished))
        first = self.stream.position
        fresh = [Group(first + i, index, ids) for i, (index, ids) in enumerate(self.stream.next(new))]
        groups = [*self.unfinished, *fresh]
        asked = [(group, i) for group in groups for i in self._to_generate(group)]
        requests = [self._request(group, i) for group, i in asked]
        # Each round has its own seed, so that a resumed run draws what the uninterrupted one would have drawn.
        seed = derive_seed(self.seed, step, *([self.begun[step]] if self.begun[step] else []))
        self.begun[step] += 1
        on_answer = partial(self._report, asked) if self.on_answer else None
        job = self.engine.start(requests, self.sampling, seed, on_answer) if requests else None
        self.unfinished = []
        self.pending.append(_Round(job, groups, asked, self.stream.state_dict(), step))

    def finish_round(self, step: int) -> list[Group]:
        """Wait for a round (started here if none is in progress); the groups that are now complete, to be scored and
        given to `accept`. Raises RunError after MOST_ROUNDS in one step."""
        if self.rounds >= MOST_ROUNDS:
            raise RunError(
                f"rollout.drop_uniform: step {step} has {len(self.ready)} of {self.settings.prompts_per_step} groups "
                f"after {self.rounds} rounds, {self.dropped} were uniform and {self.too_old} older than "
                "rollout.max_staleness; the prompts are too easy or too hard for this policy: take others, or set "
                "rollout.drop_uniform=false"
            )
        if not self.pending:
            self.start_round(step)
        pending = self.pending.popleft()
        self._answer(pending)
        if pending.step is not None:
            self.rounds += 1
        self.unfinished += [group for group in pending.groups if self._to_generate(group)]
        return [group for group in pending.groups if not self._to_generate(group)]

    def _answer(self, pending: _Round) -> None:
        """Wait for a round's answers, if it has not got them."""
        asked, pending.asked = pending.asked, []
        if not asked:
            return
        answers = self.engine.finish(pending.job)
        for (group, i), rollouts in zip(asked, answers, strict=True):
            if i is None:
                group.rollouts = rollouts
            else:
                group.rollouts[i] = group.rollouts[i].followed_by(rollouts[0])
        pending.job, self.stream_state = None, pending.stream_state

    def accept(self, groups: list[Group]) -> None:
        """Make scored groups available to `take`, without uniform ones if `rollout.drop_uniform` is set, and without
        those beyond `rollout.max_staleness`."""
        fresh = self._fresh(groups)
        accepted = [group for group in fresh if not (self.settings.drop_uniform and group.is_uniform)]
        self.dropped += len(fresh) - len(accepted)
        self.ready = sorted([*self.ready, *accepted], key=lambda group: group.position)

    def take(self) -> tuple[list[Group], dict[str, float]]:
        """The step's groups, and metrics: rollout/rounds, rollout/uniform_dropped and rollout/stale_dropped of this
        step, and rollout/carried_groups, the groups left for later ones."""
        n = self.settings.prompts_per_step - len(self.replayed)
        taken, self.ready = self.ready[:n], self.ready[n:]
        self.kept.extend(taken)
        carried = len(self.ready) + len(self.unfinished)
        counts = {"rounds": self.rounds, "carried_groups": carried}
        counts |= {"uniform_dropped": self.dropped, "stale_dropped": self.too_old}
        counts |= {"replayed_groups": len(self.replayed)} if self.settings.replay else {}
        taken, self.replayed = [*taken, *self.replayed], []
        self.rounds = self.dropped = self.too_old = 0
        return taken, {f"rollout/{name}": float(value) for name, value in counts.items()}

    def _fresh(self, groups: list[Group]) -> list[Group]:
        """Those without a token older than `rollout.max_staleness`; the others are counted."""
        kept = [group for group in groups if self._is_fresh(group)]
        self.too_old += len(groups) - len(kept)
        return kept

    def _is_fresh(self, group: Group) -> bool:
        most = self.settings.max_staleness
        return most is None or self.step - 1 - group.oldest_version <= most

    def state_dict(self) -> dict[str, Any]:
        """The queue's part of a checkpoint. A round that the engine has not answered will be started again; of those
        that it has, the answers are kept."""
        open_rounds = [pending for pending in self.pending if pending.asked]
        under_way = [group for pending in open_rounds for group in pending.groups if group.rollouts]
        groups = sorted([*self.ready, *self.unfinished, *under_way], key=lambda group: group.position)
        rounds = [
            {
                "step": pending.step,
                "stream": pending.stream_state,
                "groups": [_saved(group) for group in pending.groups],
            }
            for pending in self.pending
            if not pending.asked
        ]
        begun = self.begun - Counter(pending.step for pending in open_rounds if pending.step is not None)
        state = {"stream": self.stream_state, "groups": [_saved(group) for group in groups]}
        if self.kept:
            state["kept"] = [_saved(group) for group in self.kept]
        return state | ({"rounds": rounds, "begun": {str(step): n for step, n in begun.items()}} if rounds else {})

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from a `state_dict()`. Complete groups come back with the next round, to be scored again; those
        that are `kept` for replay have to be scored by the caller."""
        self.stream_state = state.get("stream") or {"place": state["cursor"]}
        self.unfinished = [self._loaded(saved) for saved in state["groups"]]
        self.begun = Counter({int(step): count for step, count in state.get("begun", {}).items()})
        for saved in state.get("rounds", []):
            groups = [self._loaded(group) for group in saved["groups"]]
            self.unfinished += [group for group in groups if not group.rollouts]  # to be asked again
            answered = [group for group in groups if group.rollouts]
            self.pending.append(_Round(None, answered, [], saved["stream"], saved["step"]))
        self.kept.extend(group for saved in state.get("kept", []) if (group := self._loaded(saved)).rollouts)
        if self.pending:  # what is complete need not wait for the next round to be begun
            complete = [group for group in self.unfinished if not self._to_generate(group)]
            self.unfinished = [group for group in self.unfinished if self._to_generate(group)]
            self.pending.appendleft(_Round(None, complete, [], self.stream_state))
        self.stream.load_state_dict(self.stream_state)

    def _loaded(self, saved: dict[str, Any]) -> Group:
        """The group that `_saved` made this of."""
        position, rollouts = saved["place"], [Rollout(**rollout) for rollout in saved["rollouts"]]
        if "index" in saved:
            return Group(position, saved["index"], saved["prompt"], rollouts)
        # Checkpoints older than prompt stores know prompts by their position only.
        self.stream.load_state_dict({"place": position})
        ((index, prompt),) = self.stream.next(1)
        return Group(position, index, prompt, rollouts)

    def _to_generate(self, group: Group) -> list[int | None]:
        """The answers to continue; [None] for a group without answers."""
        if not group.rollouts:
            return [None]
        return [i for i, rollout in enumerate(group.rollouts) if self._is_unfinished(rollout)]

    def _is_unfinished(self, rollout: Rollout) -> bool:
        return rollout.finish_reason == "length" and len(rollout.response) < self.sampling.max_tokens

    def _report(self, asked: list[tuple[Group, int | None]], request: int, i: int, rollout: Rollout) -> None:
        """The engine's AnswerCallback for a round that asked for this."""
        assert self.on_answer
        group, continued = asked[request]
        if continued is not None:
            i, rollout = continued, group.rollouts[continued].followed_by(rollout)
        if not self._is_unfinished(rollout):
            self.on_answer(group, i, rollout)

    def _request(self, group: Group, i: int | None) -> Request:
        """Asks for all answers of a new group, or for the continuation of its answer `i`."""
        most = self.settings.partial_tokens or self.sampling.max_tokens
        if i is None:
            return Request(group.prompt, self.settings.group_size, min(most, self.sampling.max_tokens))
        so_far = group.rollouts[i].response
        return Request([*group.prompt, *so_far], 1, min(most, self.sampling.max_tokens - len(so_far)))


def _saved(group: Group) -> dict[str, Any]:
    """A group in a checkpoint, under the names that checkpoints have always had."""
    rollouts = [asdict(rollout) for rollout in group.rollouts]
    return {"place": group.position, "index": group.index, "prompt": group.prompt, "rollouts": rollouts}


def derive_seed(*numbers: int) -> int:
    """A seed of its own for each step, so that no random state has to be kept between steps."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])
