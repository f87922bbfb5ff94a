"""Which prompts are answered when. The engine here is scripted, so that every case can be told to the token; the same
settings with the real server are in tests/integration/test_sglang_training.py."""

from __future__ import annotations

from copy import deepcopy
from dataclasses import dataclass, field
from typing import Any

import pytest

from flowrl_mega.config import RolloutSettings, RunError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.engine import AnswerCallback, Request, Rollout
from flowrl_mega.rollout.group_queue import Group, GroupQueue, derive_seed


@dataclass
class Score:
    reward: float


@dataclass
class Scripted:
    """An engine that knows how long each answer of each prompt is; a token says prompt, answer and position."""

    lengths: dict[int, list[int]]  # by position of the prompt
    version: int = 0
    jobs: list[tuple[list[Request], int]] = field(default_factory=list)
    reported: list[tuple[int, int, Rollout]] = field(default_factory=list)  # answers that are complete, as they came

    def start(
        self, requests: list[Request], sampling: Sampling, seed: int, on_answer: AnswerCallback
    ) -> list[list[Rollout]]:
        self.jobs.append((requests, seed))
        job = [[self._write(request, i) for i in range(request.answers)] for request in requests]
        for number, rollouts in enumerate(job):
            for i, rollout in enumerate(rollouts):
                on_answer(number, i, rollout)
        return job

    def report(self, group: Group, i: int, rollout: Rollout) -> None:
        self.reported.append((group.position, i, rollout))

    def _write(self, request: Request, i: int) -> Rollout:
        position, *so_far = request.prompt
        if so_far:
            i = so_far[0] // 100
        whole = [100 * i + t for t in range(self.lengths[position][i])]
        tokens = whole[len(so_far) : len(so_far) + request.max_tokens]
        ended = len(so_far) + len(tokens) == len(whole)
        return Rollout(tokens, [-0.5] * len(tokens), "stop" if ended else "length", [(self.version, len(tokens))])

    def finish(self, job: list[list[Rollout]]) -> list[list[Rollout]]:
        return job


class Positions:
    """A stream in which each prompt is its own position; the data set has 1000 prompts, in reverse order."""

    position = 0

    def next(self, n: int) -> list[tuple[int, list[int]]]:
        self.position += n
        return [(1000 - position, [position]) for position in range(self.position - n, self.position)]

    def state_dict(self) -> dict[str, int]:
        return {"place": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["place"]


def make(lengths: dict[int, list[int]], **settings: Any) -> tuple[GroupQueue, Scripted]:
    engine = Scripted(lengths)
    rollout = RolloutSettings(
        **{"engine": "sglang", "prompts_per_step": 2, "group_size": 2, "max_tokens": 10, **settings}
    )
    at_once = settings.get("engine") == "embedded"
    return GroupQueue(engine, Positions(), rollout, Sampling(10), 7, engine.report, at_once), engine


def train(queue: GroupQueue, engine: Scripted, steps: range, last: int) -> list[tuple[list[int], list[Any]]]:
    """So many steps of a trainer: the prompts that each took, and their answers. A step ends with newer weights."""
    taken = []
    for step in steps:
        groups = fill(queue, step)
        queue.start_ahead(step, last)
        engine.version = step
        taken.append((positions(groups), [group.rollouts for group in groups]))
    return taken


def fill(queue: GroupQueue, step: int, rewards: dict[int, list[float]] | None = None, take: bool = True) -> list[Group]:
    """What the trainer does for a step."""
    queue.begin_step(step)
    while not queue.has_enough:
        groups = queue.finish_round(step)
        for group in groups:
            group.scores = [Score(r) for r in (rewards or {}).get(group.position, [0.0, 1.0])]
        queue.accept(groups)
    return queue.take()[0] if take else []


def positions(groups: list[Group]) -> list[int]:
    return [group.position for group in groups]


def test_every_prompt_is_taken_once_and_in_order() -> None:
    """Without any of the options a step is one round of the next prompts, with the seed of its step: what the trainer
    always did, so earlier runs reproduce."""
    queue, engine = make({i: [3, 5] for i in range(6)})
    assert [positions(fill(queue, step)) for step in (1, 2, 3)] == [[0, 1], [2, 3], [4, 5]]
    assert [seed for _, seed in engine.jobs] == [derive_seed(7, step) for step in (1, 2, 3)]
    assert engine.jobs[0][0] == [Request([0], 2, 10), Request([1], 2, 10)]


def test_a_long_answer_goes_on_in_the_next_step_and_keeps_its_old_tokens() -> None:
    """Partial rollouts: the tokens of the first part, their log-probs and their version stay as they were; the second
    part is asked for with the first at the end of the prompt, and only of the answer that needs it."""
    queue, engine = make({0: [9, 2], 1: [3, 3], 2: [4, 4], 3: [1, 1], 4: [1, 1]}, partial_tokens=4, oversample=1.5)
    assert positions(fill(queue, 1)) == [1, 2]
    engine.version = 1
    assert positions(fill(queue, 2)) == [3, 4]
    assert engine.jobs[1][0] == [Request([0, 0, 1, 2, 3], 1, 4), Request([3], 2, 4), Request([4], 2, 4)]
    engine.version = 2
    (group, _) = fill(make_more(queue, engine), 3)
    assert group.position == 0
    assert group.rollouts[0].response == list(range(9))
    assert group.rollouts[0].versions == [(0, 4), (1, 4), (2, 1)]
    assert group.rollouts[0].finish_reason == "stop"
    assert group.rollouts[1].versions == [(0, 2)]
    assert (0, 0, group.rollouts[0]) in engine.reported


def test_each_complete_answer_is_reported_once() -> None:
    """In the order in which they end: of one that goes on, all its parts together and nothing before; so its score can
    be begun while others are written."""
    queue, engine = make({0: [50, 2], 1: [5, 50]}, partial_tokens=4)
    groups = fill(queue, 1)
    assert [(position, i) for position, i, _ in engine.reported] == [(0, 1), (1, 0), (0, 0), (1, 1)]
    assert all(groups[position].rollouts[i] == rollout for position, i, rollout in engine.reported)


def make_more(queue: GroupQueue, engine: Scripted) -> GroupQueue:
    engine.lengths |= {i: [1, 1] for i in range(5, 9)}
    return queue


def test_an_answer_cut_at_max_tokens_is_complete() -> None:
    """Its finish reason is the same, "length"; were it asked to go on, it would never end."""
    queue, engine = make({0: [50, 2], 1: [50, 50]}, partial_tokens=4)
    groups = fill(queue, 1)
    assert positions(groups) == [0, 1]
    assert [len(r.response) for g in groups for r in g.rollouts] == [10, 2, 10, 10]
    assert len(engine.jobs) == 3  # 4 + 4 + 2 tokens
    assert [request.max_tokens for request in engine.jobs[2][0]] == [2, 2, 2]
    assert len({seed for _, seed in engine.jobs}) == 3  # or the second part would draw the first one's numbers again


def test_ahead_does_not_change_what_a_step_trains_on() -> None:
    """The round that is begun early has the same requests and seed: only the version of the weights differs."""
    lengths = {i: [i % 4 + 1, 3] for i in range(8)}
    (plain, engine), (ahead, early) = make(lengths), make(lengths, ahead=1)
    for step in (1, 2, 3):
        expected, found = fill(plain, step), fill(ahead, step)
        assert [g.rollouts for g in found] == [g.rollouts for g in expected]
        ahead.start_ahead(step, last=9)
    assert early.jobs[:3] == engine.jobs[:3]


@pytest.mark.parametrize("ahead", [0, 1, 3])
def test_so_many_steps_ahead(ahead: int) -> None:
    """The same prompts, requests and seeds; the answers of step t are of the weights after t - 1 - ahead."""
    lengths = {i: [i % 4 + 1, 3] for i in range(20)}
    (plain, usual), (queue, engine) = make(lengths), make(lengths, ahead=ahead, engine="embedded")
    expected, found = train(plain, usual, range(1, 8), 7), train(queue, engine, range(1, 8), 7)
    assert [prompts for prompts, _ in found] == [prompts for prompts, _ in expected]
    assert engine.jobs == usual.jobs, "nothing is begun for steps beyond the last"
    for step, (_, answers) in enumerate(found, start=1):
        versions = {version for of in answers for rollout in of for version, _ in rollout.versions}
        assert versions == {max(0, step - 1 - ahead)}


def test_behind_servers_a_round_is_not_waited_for() -> None:
    """It is under way while the steps before it train."""
    queue, engine = make({i: [2, 2] for i in range(20)}, ahead=3)
    engine.finish = lambda job: pytest.fail("waited")  # type: ignore[method-assign]
    queue.begun[1] += 1
    queue.start_ahead(1, last=9)
    assert [pending.step for pending in queue.pending] == [2, 3, 4]


@pytest.mark.parametrize("options", [{}, {"oversample": 1.5}, {"drop_uniform": True}])
@pytest.mark.parametrize("stop", [1, 2, 4])
def test_answers_kept_for_later_steps_are_in_the_checkpoint(stop: int, options: dict[str, Any]) -> None:
    """Weights that wrote them are gone: a resumed run takes these very answers, and asks for what the other asks."""
    lengths = {i: [i % 4 + 1, 3] for i in range(40)}
    whole, engine = make(lengths, ahead=3, engine="embedded", **options)
    train(whole, engine, range(1, stop + 1), 7)
    state, asked = deepcopy(whole.state_dict()), len(engine.jobs)
    expected = train(whole, engine, range(stop + 1, 8), 7)
    resumed, again = make(lengths, ahead=3, engine="embedded", **options)
    again.version = stop
    resumed.load_state_dict(state)
    assert train(resumed, again, range(stop + 1, 8), 7) == expected
    assert again.jobs == engine.jobs[asked:]


def test_oversampled_groups_are_carried_not_lost() -> None:
    """What was answered beyond a step's need is trained on next, so no prompt is skipped and short answers are not
    favoured over the run."""
    queue, engine = make({i: [2, 2] for i in range(9)}, oversample=1.5)
    taken = [positions(fill(queue, step)) for step in (1, 2, 3)]
    assert taken == [[0, 1], [2, 3], [4, 5]]
    assert [len(requests) for requests, _ in engine.jobs] == [3, 2, 2]  # one is left over from each step before


def test_uniform_groups_are_replaced() -> None:
    """drop_uniform: other prompts take their places, with another seed in each round of the step."""
    queue, engine = make({i: [2, 2] for i in range(9)}, drop_uniform=True)
    rewards = {0: [1.0, 1.0], 2: [0.0, 0.0]}
    assert positions(fill(queue, 1, rewards)) == [1, 3]
    assert [len(requests) for requests, _ in engine.jobs] == [2, 1, 1]
    assert len({seed for _, seed in engine.jobs}) == 3


def test_what_a_step_cost_is_counted() -> None:
    """Rounds and dropped groups of this step alone, and what is carried to later ones, half-written groups included."""
    lengths = {i: [9 if i == 5 else 2, 2] for i in range(30)}
    queue, _ = make(lengths, drop_uniform=True, oversample=1.5, partial_tokens=4)
    counted = []
    for step, uniform in ((1, (0, 1, 2)), (2, ()), (3, ())):
        fill(queue, step, dict.fromkeys(uniform, [1.0, 1.0]), take=False)
        counted.append(queue.take()[1])
    # step 1: 0 1 2 are dropped, then 3 4 are taken and 5 goes on; step 2: 5 goes on, 6 and 7 are taken; step 3: 5, 8
    assert counted == [
        {
            "rollout/rounds": 2.0,
            "rollout/uniform_dropped": 3.0,
            "rollout/stale_dropped": 0.0,
            "rollout/carried_groups": 1.0,
        },
        {
            "rollout/rounds": 1.0,
            "rollout/uniform_dropped": 0.0,
            "rollout/stale_dropped": 0.0,
            "rollout/carried_groups": 1.0,
        },
        {
            "rollout/rounds": 1.0,
            "rollout/uniform_dropped": 0.0,
            "rollout/stale_dropped": 0.0,
            "rollout/carried_groups": 1.0,
        },
    ]


def test_prompts_that_never_differ_end_in_words_not_in_a_hang() -> None:
    """A filter that nothing passes would generate for ever."""
    queue, _ = make({i: [2, 2] for i in range(200)}, drop_uniform=True)
    with pytest.raises(RunError, match=r"rollout.drop_uniform: step 1 has 0 of 2 groups after 64 rounds"):
        fill(queue, 1, {i: [1.0, 1.0] for i in range(200)})


@pytest.mark.parametrize("ahead", [False, True])
def test_a_resumed_run_goes_on_as_the_uninterrupted_one(ahead: bool) -> None:
    """The checkpoint holds what is carried, the half-written answers included; a round under way is asked for again."""
    lengths = {i: [9 if i % 3 == 0 else 3, 2] for i in range(20)}
    options = {"partial_tokens": 4, "oversample": 2.0}
    whole, engine = make(lengths, **options)
    fill(whole, 1)
    state = whole.state_dict()
    if ahead:
        whole.start_round(2)
        assert whole.state_dict() == state
    expected = [[(g.position, g.rollouts) for g in fill(whole, step)] for step in (2, 3)]
    resumed, again = make(lengths, **options)
    resumed.load_state_dict(state)
    assert [[(g.position, g.rollouts) for g in fill(resumed, step)] for step in (2, 3)] == expected
    assert again.jobs == engine.jobs[1:]


def test_a_checkpoint_of_before_prompt_stores_goes_on_too() -> None:
    """It has a cursor and positions, no indices and no prompts: the same groups and next prompts come of it."""
    lengths = {i: [9 if i % 3 == 0 else 3, 2] for i in range(20)}
    whole, _ = make(lengths, partial_tokens=4, oversample=2.0)
    fill(whole, 1)
    state = whole.state_dict()
    assert state["groups"]
    old = {
        "cursor": state["stream"]["place"],
        "groups": [{"place": group["place"], "rollouts": group["rollouts"]} for group in state["groups"]],
    }
    expected = [[(g.position, g.index, g.prompt, g.rollouts) for g in fill(whole, step)] for step in (2, 3)]
    resumed, _ = make(lengths, partial_tokens=4, oversample=2.0)
    resumed.load_state_dict(old)
    assert [[(g.position, g.index, g.prompt, g.rollouts) for g in fill(resumed, step)] for step in (2, 3)] == expected


@pytest.mark.parametrize("most", [0, 1, 2, None])
def test_no_group_has_a_token_that_is_too_old(most: int | None) -> None:
    """An answer that goes on over steps is as old as its first token, and its group as its oldest answer; what is
    carried grows older as it waits. Others take their places, and they are counted."""
    lengths = {i: [10 if i % 3 == 0 else 2, 2] for i in range(90)}
    queue, engine = make(lengths, partial_tokens=4, oversample=2.0, max_staleness=most)
    oldest, dropped = [], 0.0
    for step in range(1, 11):
        taken = fill(queue, step, take=False) or queue.take()
        groups, counts = taken
        oldest += [step - 1 - min(v for r in group.rollouts for v, _ in r.versions) for group in groups]
        dropped += counts["rollout/stale_dropped"]
        engine.version = step
    assert max(oldest) == (2 if most is None else most)
    assert (dropped > 0) == (most in (0, 1))


REPLAY = {"prompts_per_step": 4, "replay": {"size": 6, "share": 0.5}}


def test_groups_of_earlier_steps_are_taken_again() -> None:
    """Whole groups as they were written, none twice in a step, of the newest that were trained on; the first step has
    none. Fewer new prompts are asked for."""
    queue, engine = make({i: [2, 3] for i in range(60)}, **REPLAY)
    trained: list[int] = []
    for step in range(1, 8):
        groups = fill(queue, step)
        engine.version = step
        fresh = [group for group in groups if group.position not in trained]
        again = [group for group in groups if group.position in trained]
        assert (len(fresh), len(again)) == ((4, 0) if step == 1 else (2, 2))
        assert len({group.position for group in again}) == len(again)
        assert all(group.position in trained[-6:] for group in again)
        assert all(len(group.rollouts) == len(group.scores) == 2 for group in groups)
        assert all(group.oldest_version < step - 1 for group in again), "with the weights of who wrote them"
        trained += positions(fresh)
    assert [len(requests) for requests, _ in engine.jobs] == [4] + 6 * [2]


def test_what_is_replayed_is_young_enough_too() -> None:
    queue, engine = make({i: [2, 3] for i in range(60)}, max_staleness=1, **REPLAY)
    for step in range(1, 8):
        assert min(group.oldest_version for group in fill(queue, step)) >= step - 2
        engine.version = step


@pytest.mark.parametrize("ahead", [0, 2])
def test_kept_groups_are_in_the_checkpoint(ahead: int) -> None:
    lengths = {i: [i % 4 + 1, 3] for i in range(60)}
    whole, engine = make(lengths, ahead=ahead, engine="embedded", **REPLAY)
    train(whole, engine, range(1, 4), 8)
    state = deepcopy(whole.state_dict())
    expected = train(whole, engine, range(4, 9), 8)
    resumed, again = make(lengths, ahead=ahead, engine="embedded", **REPLAY)
    again.version = 3
    resumed.load_state_dict(state)
    assert train(resumed, again, range(4, 9), 8) == expected
