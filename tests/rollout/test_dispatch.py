"""Prompts to servers that fail in every way that they can: each is answered once, rightly, by the right weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from stand_in import StandIn, answer_tokens

from flowrl_mega.config import ConfigError, RolloutSettings, RunError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout import health
from flowrl_mega.rollout.answers import answer_seeds
from flowrl_mega.rollout.api import LoopThread
from flowrl_mega.rollout.attached import connect
from flowrl_mega.rollout.dispatch import Dispatcher, Job
from flowrl_mega.rollout.engine import Request, Rollout

STOPS = (1, 17, 40, 41, 42, 77)
SAMPLING = Sampling(12, stop_ids=STOPS)
REQUESTS = [Request([place + 2, 3, 4], 3, 12) for place in range(20)]


def expected(requests: list[Request] = REQUESTS, seed: int = 7) -> list[list[tuple[list[int], list[float]]]]:
    """(tokens, log-probs) of the stand-in's answers to a job, worked out without the code under test but the seeds."""
    given = {"max_new_tokens": 12, "stop_token_ids": STOPS}
    return [
        [answer_tokens(request.prompt, {**given, "sampling_seed": seed}, vocab=101) for seed in seeds]
        for request, seeds in zip(requests, answer_seeds(requests, seed), strict=True)
    ]


def content(answers: list[list[Rollout] | None]) -> list[list[tuple[list[int], list[float]]]]:
    return [[(rollout.response, rollout.logp) for rollout in of or []] for of in answers]


class Ours:
    """What stands for the fleet, where servers are ours: it can start them again."""

    def __init__(self, servers: list[StandIn]) -> None:
        self.servers = {server.url: server for server in servers}
        self.dead: set[str] = set()
        self.restarted: list[str] = []

    def is_alive(self, url: str) -> bool:
        return url not in self.dead

    def restart(self, url: str) -> None:
        server = self.servers[url]
        if url not in self.dead:
            server.hang(False)
            server.die()
        server.restart()
        self.dead.discard(url)
        self.restarted.append(url)


class Driver:
    """A dispatcher and what the engine does for it, without ranks or weights."""

    def __init__(self, servers: list[StandIn], ours: Ours | None = None, **settings: Any) -> None:
        self.servers = {server.url: server for server in servers}
        self.loop = LoopThread()
        settings = {"request_timeout_s": 20.0, "hang_s": 60.0, **settings}
        self.settings = RolloutSettings(engine="sglang", servers=[server.url for server in servers], **settings)
        assert isinstance(self.settings.servers, list)
        entries = self.loop.call(connect(self.settings.servers, None))
        self.servers |= {server.url: StandInOf[server.url] for entry in entries for server in entry.servers}
        self.dispatcher = Dispatcher(self.settings, entries, 101, ours)
        self.loop.call(self.dispatcher.open())
        self.version = 0
        self.refusing: dict[str, str] = {}

    def push(self, urls: list[str] | None = None, version: int | None = None) -> None:
        """New weights, or the same again, as WeightSync would give them."""
        self.version = self.version if version is None else version
        apis = self.loop.call(self.dispatcher.before_push(urls, self.version))
        given = [api for api in apis if api.url not in self.refusing]
        for api in given:
            self.loop.call(api.post("/continue_generation"))
            self.servers[api.url].version = str(self.version)
        failures = {api.url: self.refusing[api.url] for api in apis if api not in given}
        self.loop.call(self.dispatcher.health.after_push([api.url for api in apis], self.version, failures))

    def start(self, requests: list[Request] = REQUESTS, seed: int = 7) -> Job:
        job = Job(requests)
        self.loop.call(self.dispatcher.add(job, SAMPLING, seed))
        return job

    def until(self, done: Callable[[], bool]) -> None:
        """As the engine waits."""
        end = time.monotonic() + 60
        while True:
            what, urls = self.loop.call(self.dispatcher.next(done, 0.5))
            if what == "done":
                return
            if what == "push":
                self.push(urls)
            assert time.monotonic() < end, "no end to it"

    def finish(self, job: Job) -> list[list[Rollout]]:
        self.until(lambda: not job.left)
        return [of or [] for of in job.answers]

    def run(self, requests: list[Request] = REQUESTS, seed: int = 7) -> list[list[Rollout]]:
        return self.finish(self.start(requests, seed))

    @property
    def counts(self) -> dict[str, int]:
        return {name: count for name, count in self.dispatcher.taken_counts().items() if count}

    def close(self) -> None:
        self.loop.call(self.dispatcher.close())
        self.loop.close()


StandInOf: dict[str, StandIn] = {}


@pytest.fixture
def stand_in() -> Iterator[Callable[..., StandIn]]:
    """Makes servers, which end with the test."""

    def make(**options: Any) -> StandIn:
        server = StandIn(**options)
        StandInOf[server.url] = server
        return server

    yield make
    for server in StandInOf.values():
        server.close()
    StandInOf.clear()


@pytest.fixture
def drive() -> Iterator[Callable[..., Driver]]:
    """Makes drivers whose servers have weights of version 0."""
    drivers: list[Driver] = []

    def make(*args: Any, **settings: Any) -> Driver:
        drivers.append(Driver(*args, **settings))
        drivers[-1].push()
        return drivers[-1]

    yield make
    for driver in drivers:
        driver.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """A server that is asked whether it lives has a moment, not 25 s."""
    monkeypatch.setattr(health, "PROBE_S", 0.3)


def test_all_prompts_are_answered_in_their_places(stand_in, drive):
    """Whichever server answers, and in whatever order: with the tokens and log-probs that this prompt and seed give."""
    servers = [stand_in(token_s=0.001), stand_in(token_s=0.001)]
    driver = drive(servers, concurrency=3)
    rollouts = driver.run()
    assert content(rollouts) == expected()
    for rollout in [rollout for of in rollouts for rollout in of]:
        assert rollout.versions == [(0, len(rollout.response))]
        assert (rollout.finish_reason == "stop") == (rollout.response[-1] in STOPS)
    for server in servers:
        assert len(server.asked("/generate")) >= 5, "the prompts are shared out"
        assert server.most_at_once == 3, "as many as allowed, and no more"
    assert driver.counts == {}
    assert len({repr(of) for of in content(rollouts)[0]}) == 3, "each answer has a seed of its own"
    assert content(driver.run(seed=8)) == expected(seed=8) != expected()


def test_the_least_loaded_server_is_asked(stand_in, drive):
    """One that is slow at what it has is not given more while others have less."""
    servers = [stand_in(token_s=0.05), stand_in(token_s=0.05), stand_in(token_s=0.05)]
    driver = drive(servers)
    job = driver.start(REQUESTS[:9])
    driver.until(lambda: sum(len(server.asked("/generate")) for server in servers) == 9)
    assert [server.most_at_once for server in servers] == [3, 3, 3]
    driver.finish(job)


FAULTS = {
    "500": ("status", 500),
    "503": ("status", 503),
    "429": ("status", 429),
    "reset": ("reset", None),
    "cut off": ("truncated", None),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_asked_again_after_a_failure(fault, stand_in, drive):
    """Of the server or of the way to it: the prompt is answered as if nothing had been."""
    server = stand_in()
    server.faults.extend([FAULTS[fault]] * 3)
    driver = drive([server])
    assert content(driver.run()) == expected()
    assert driver.counts == {"failed_requests": 3, "retries": 3}


def edited(**changes: Any) -> Callable[[list[dict]], list[dict]]:
    """The first answer changed, in its meta_info where the name belongs there."""

    def edit(answers: list[dict]) -> list[dict]:
        first = answers[0]
        for name, change in changes.items():
            where = first["meta_info"] if name in first["meta_info"] else first
            where[name] = change(where[name]) if callable(change) else change
        return answers

    return edit


def of_other_tokens(entries: list[list]) -> list[list]:
    return [[logp, (token + 1) % 101] for logp, token, _ in entries]


def with_logp(value: Any) -> Callable[[list[dict]], list[dict]]:
    return edited(output_token_logprobs=lambda entries: [[value, *entries[0][1:]], *entries[1:]])


MALFORMED = {
    "an answer too few": lambda answers: answers[1:],
    "no list": lambda answers: answers[0],
    "nothing": lambda answers: None,
    "no meta_info": lambda answers: [{"output_ids": answer["output_ids"]} for answer in answers],
    "aborted": edited(finish_reason={"type": "abort", "message": "Abort before prefill"}),
    "no reason": edited(finish_reason=None),
    "no ids": edited(output_ids=None),
    "no tokens": edited(output_ids=[], output_token_logprobs=[], weight_versions=[]),
    "too many tokens": edited(output_ids=[5] * 13, output_token_logprobs=[[-1.0, 5, None]] * 13),
    "an id that is a float": edited(output_ids=lambda ids: [float(ids[0]), *ids[1:]]),
    "an id that is true": edited(output_ids=lambda ids: [True, *ids[1:]]),
    "an id beyond the vocabulary": edited(output_ids=lambda ids: [101, *ids[1:]]),
    "a negative id": edited(output_ids=lambda ids: [-1, *ids[1:]]),
    "no log-probs": edited(output_token_logprobs=None),
    "a log-prob too few": edited(output_token_logprobs=lambda entries: entries[1:]),
    "log-probs of other tokens": edited(output_token_logprobs=of_other_tokens),
    "bare log-probs": edited(output_token_logprobs=lambda entries: [entry[0] for entry in entries]),
    "null for a log-prob": with_logp(None),
    "NaN": with_logp(float("nan")),
    "infinity": with_logp(-float("inf")),
    "a probability above one": with_logp(0.1),
    "text for a log-prob": with_logp("-1.0"),
    "versions of half an answer": edited(weight_versions=[{"version": "0", "start": 0, "end": 0}]),
    "versions with a hole": edited(weight_versions=[{"version": "0", "start": 1, "end": 12}]),
    "versions without an end": edited(weight_versions=[{"version": "0", "start": 0}]),
}  # fmt: skip


@pytest.mark.parametrize("kind", MALFORMED)
def test_a_malformed_answer_is_not_taken(kind, stand_in, drive):
    """Not a token of it gets into training: the prompt is asked again, and the count says that something is wrong."""
    server = stand_in()
    server.faults.append(("edit", MALFORMED[kind]))
    driver = drive([server])
    assert content(driver.run(REQUESTS[:2])) == expected(REQUESTS[:2])
    assert driver.counts == {"malformed": 1, "retries": 1}


def test_a_refusal_is_not_repeated(stand_in, drive):
    """A prompt that the server says is wrong stays wrong: one clear error, at once."""
    server = stand_in()
    driver = drive([server], concurrency=1)
    with pytest.raises(ConfigError, match=rf"{server.url} refuses a prompt of 120 tokens: .*maximum context length"):
        driver.run([Request([2] * 120, 1, 12)])
    assert len(server.asked("/generate")) == 1


def test_a_prompt_that_never_succeeds_ends_the_job(stand_in, drive):
    """In time, and with what was wrong last."""
    server = stand_in()
    server.faults.extend([("status", 500)] * 1000)
    driver = drive([server], request_timeout_s=1.0)
    with pytest.raises(
        RunError, match=rf"request_timeout_s = 1: .* attempts, the last at {server.url}: .*as it was told"
    ):
        driver.run()
    assert len(server.asked("/generate")) < 200, "with pauses in between"


def test_no_answer_at_all_ends_the_job(stand_in, drive):
    """A server that lives and keeps one prompt for ever is found out by the prompt's own time."""
    server = stand_in()
    server.faults.append(("never", None))
    driver = drive([server], request_timeout_s=1.0)
    with pytest.raises(RunError, match="request_timeout_s = 1: .*no answer in 1 s"):
        driver.run(REQUESTS[:1])


@pytest.mark.parametrize("hangs", [False, True], ids=["dies", "hangs"])
def test_a_server_of_ours_is_started_again(hangs, stand_in, drive, impatient, capfd):
    """Its prompts go to the other meanwhile; it comes back with the weights of today."""
    first, second = stand_in(token_s=0.001), stand_in(token_s=0.001)
    ours = Ours([first, second])
    driver = drive([first, second], ours, concurrency=2, hang_s=0.5)
    driver.push(version=3)
    job = driver.start()
    if hangs:
        first.hang()
    else:
        ours.dead.add(first.url)
        first.die()
    assert content(driver.finish(job)) == expected()
    assert {version for of in job.answers for rollout in of for version, _ in rollout.versions} == {3}
    assert ours.restarted == [first.url]
    driver.until(driver.dispatcher.has_server)
    before = len(first.asked("/generate"))
    driver.until(lambda: all(server.state == "ready" for server in driver.dispatcher.health.servers))
    assert content(driver.run(seed=9)) == expected(seed=9)
    assert len(first.asked("/generate")) > before, "it is used again"
    assert first.version == "3"
    counts = driver.counts
    assert counts["restarts"] == counts["servers_lost"] == 1
    assert ("does not answer" if hangs else "has died") in capfd.readouterr().err


def test_a_server_that_keeps_dying_ends_the_job(stand_in, drive, impatient):
    """For it is something that we send; it would go on for ever."""
    server = stand_in()
    ours = Ours([server])
    driver = drive([server], ours)
    server.faults.extend([("die", None)] * 10)
    mark = ours.is_alive
    ours.is_alive = lambda url: mark(url) and server.runner.server is not None  # type: ignore[method-assign]
    with pytest.raises(RunError, match=rf"{server.url} .*4th time without an answer"):
        driver.run(REQUESTS[:1])
    assert len(ours.restarted) == 3


def test_a_server_may_die_often_in_a_long_run(stand_in, drive, impatient):
    """As long as it answers something in between."""
    server = stand_in()
    ours = Ours([server])
    driver = drive([server], ours, concurrency=1)
    server.faults.extend([("die", None), ("", None)] * 5)
    mark = ours.is_alive
    ours.is_alive = lambda url: mark(url) and server.runner.server is not None  # type: ignore[method-assign]
    assert content(driver.run()) == expected()
    assert len(ours.restarted) == 5


def test_a_server_of_others_is_left_out_until_it_is_back(stand_in, drive, impatient, capfd):
    """Then it gets weights before it gets prompts: it has those of its start."""
    first, second = stand_in(token_s=0.001), stand_in(token_s=0.02)
    first.faults.append(("die", 0.8))
    driver = drive([first, second], concurrency=2)
    job = driver.start()
    assert content(driver.finish(job)) == expected()
    driver.until(lambda: first.version == "0")
    assert content(driver.run(seed=9)) == expected(seed=9)
    assert f"server {first.url} does not answer" in capfd.readouterr().err
    assert {version for of in job.answers for rollout in of for version, _ in rollout.versions} == {0}


def test_prompts_of_a_silent_server_go_to_another(stand_in, drive, impatient):
    """It takes them, says nothing and stays like this: the others answer them, and do not wait for its connections."""
    first, second = stand_in(token_s=0.001), stand_in(token_s=0.001)
    driver = drive([first, second], concurrency=2, hang_s=0.5)
    first.hang()
    assert content(driver.run()) == expected()
    assert first.hangs and len(first.asked("/generate")) == 2


def test_no_server_left_ends_the_job(stand_in, drive, impatient):
    """With the names of those that are gone."""
    first, second = stand_in(), stand_in()
    driver = drive([first, second], request_timeout_s=1.5)
    for server in (first, second):
        server.die()
    with pytest.raises(RunError, match=rf"no server .*{first.url} does not answer.*{second.url} does not answer"):
        driver.run()


@pytest.mark.parametrize("version", ["default", "3", "6", "x1", "4.0", "-4"])
def test_answers_of_other_weights_are_thrown_away(version, stand_in, drive, capfd):
    """Restarted behind our back it says what it said at its start; older, newer and unreadable ones are as wrong. The
    server gets the weights again, once, and the prompts are answered by them."""
    server = stand_in()
    driver = drive([server])
    driver.push(version=4)
    driver.push(version=5)
    server.version = version
    rollouts = driver.run()
    assert content(rollouts) == expected()
    assert {span for of in rollouts for rollout in of for span, _ in rollout.versions} == {5}
    assert server.version == "5"
    assert driver.counts["stale_answers"] == 1
    assert f"answers with weights {version!r}, not version 5; it gets the weights again" in capfd.readouterr().err


def test_new_weights_in_the_middle_of_an_answer(stand_in, drive):
    """Each token has the version that made it; what came before the update is not thrown away."""
    server = stand_in(token_s=0.02)
    driver = drive([server])
    job = Job([Request([2, 3], 2, 60)])
    driver.loop.call(driver.dispatcher.add(job, Sampling(60), 1))
    while not server.asked("/generate"):
        time.sleep(0.01)
    time.sleep(0.2)
    driver.push(version=1)
    for rollout in driver.finish(job)[0]:
        assert [version for version, _ in rollout.versions] == [0, 1]
        assert sum(length for _, length in rollout.versions) == len(rollout.response) == 60
    assert driver.counts == {}


def test_held_prompts_wait(stand_in, drive):
    """Where answers under way are waited for before an update, new ones must not begin."""
    server = stand_in(token_s=0.005)
    driver = drive([server], concurrency=4)
    job = driver.start()
    driver.loop.call(driver.dispatcher.set_hold(True))
    driver.until(driver.dispatcher.is_idle)
    assert 0 < job.left < len(REQUESTS)
    assert len(server.asked("/generate")) == 4
    driver.push(version=1)
    assert len(server.asked("/generate")) == 4
    driver.loop.call(driver.dispatcher.set_hold(False))
    assert content(driver.finish(job)) == expected()
    versions = [{version for rollout in of for version, _ in rollout.versions} for of in job.answers]
    assert versions == [{0}] * 4 + [{1}] * 16


def test_weights_that_are_not_taken(stand_in, drive, impatient):
    """A server that refuses them gets no prompts, is tried again, and is given up; with the last one the job ends."""
    first, second = stand_in(), stand_in()
    driver = drive([first, second], request_timeout_s=60.0)
    driver.refusing[first.url] = "size mismatch"
    driver.push(version=1)
    assert content(driver.run()) == expected()
    assert not first.asked("/generate")
    refused = driver.dispatcher.health.servers[0]
    driver.until(lambda: refused.state == "refused")
    assert refused.refusals == 3
    assert content(driver.run(seed=9)) == expected(seed=9)
    driver.refusing[second.url] = "no such tensor"
    driver.push(version=2)
    with pytest.raises(RunError, match=rf"{first.url} did not take .*size mismatch; {second.url} .*no such tensor"):
        driver.run()


def test_a_router_gets_prompts_and_its_servers_get_weights(stand_in, drive):
    """A router passes on one prompt a request, and knows nothing of weights; a server behind it that has been
    restarted is found by what it answers."""
    workers = [stand_in(), stand_in()]
    router = stand_in()
    router.workers = [worker.url for worker in workers]
    driver = drive([router])
    driver.push(version=2)
    assert [worker.version for worker in workers] == ["2", "2"]
    assert content(driver.run()) == expected()
    assert len(router.asked("/generate")) == 3 * len(REQUESTS)
    assert all(worker.asked("/generate") for worker in workers)
    workers[0].version = "default"
    rollouts = driver.run(seed=9)
    assert content(rollouts) == expected(seed=9)
    assert {span for of in rollouts for rollout in of for span, _ in rollout.versions} == {2}
    assert driver.counts["stale_answers"] >= 1


def test_memory_is_given_back_and_taken_again(stand_in, drive):
    """The weights' before the update, that of keys and values after it, and neither twice, which kills the server."""
    server = stand_in()
    driver = drive([server])
    for _ in range(2):
        driver.loop.call(driver.dispatcher.health.release())
    assert server.memory == set()
    driver.push(version=1)
    assert content(driver.run()) == expected()
    driver.push(version=2)
    asked = [path for path, _ in server.seen if path.endswith(("occupation", "continue_generation"))]
    tags = [body["tags"] for path, body in server.seen if path.endswith("occupation")]
    release, weights, cache = (
        ["/release_memory_occupation"],
        ["/resume_memory_occupation"],
        ["/resume_memory_occupation"],
    )
    update = ["/continue_generation"]  # ends each
    assert asked == update + release + weights + update + cache + update
    assert tags == [["kv_cache", "weights"], ["weights"], ["kv_cache"]]


def test_closing_leaves_no_work_behind(stand_in):
    """Servers of others go on without us: what they are at for us is theirs to drop."""
    server = stand_in(token_s=1.0)
    driver = Driver([server])
    driver.push()
    driver.start()
    while not server.asked("/generate"):
        time.sleep(0.01)
    driver.close()
    assert server.asked("/abort_request") == [{"abort_all": True}]
