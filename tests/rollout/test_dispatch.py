"""Prompts to servers that fail in every way that they can: each is answered once, rightly, or the job ends."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import pytest
from driving import REQUESTS, STOPS, Driver, content, expected

from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.dispatch import Job
from flowrl_mega.rollout.engine import Request


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


def spans(*ends: int, version: str = "0") -> list[dict]:
    """What the tokens up to each end were made by."""
    return [{"version": version, "start": a, "end": b} for a, b in zip((0, *ends), ends, strict=False)]


def of_other_tokens(entries: list[list]) -> list[list]:
    return [[logp, (token + 1) % 101] for logp, token, _ in entries]


def with_token(token: Any) -> Callable[[list[dict]], list[dict]]:
    """With its log-prob, so that nothing else is wrong."""
    return edited(
        output_ids=lambda ids: [token, *ids[1:]],
        output_token_logprobs=lambda entries: [[entries[0][0], token, None], *entries[1:]],
    )


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
    "too many tokens": edited(
        output_ids=[5] * 13, output_token_logprobs=[[-1.0, 5, None]] * 13, weight_versions=spans(13)
    ),
    "an id that is a float": with_token(5.0),
    "an id that is true": with_token(True),
    "an id beyond the vocabulary": with_token(101),
    "a negative id": with_token(-1),
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


def test_a_version_that_made_no_token_is_not_told(stand_in, drive):
    """Two updates may come between two tokens."""
    server = stand_in()
    server.faults.append(("edit", edited(weight_versions=lambda of: [*spans(0), *of])))
    assert drive([server]).run(REQUESTS[:1])[0][0].versions == [(0, len(expected()[0][0][0]))]


def test_what_is_asked_for(stand_in, drive):
    """By SGLang's names: 0 of ours is its -1, where all ids are drawn from; ids that end an answer end it."""
    server = stand_in()
    driver = drive([server])
    for top_k in (0, 5):
        job = Job(REQUESTS[:1])
        driver.loop.call(driver.dispatcher.add(job, Sampling(99, 0.7, 0.9, top_k, (4, 5)), 1))
        driver.finish(job)
    first, second = [body["sampling_params"] for body in server.asked("/generate")]
    wanted = {"max_new_tokens": 12, "temperature": 0.7, "top_p": 0.9, "stop_token_ids": [4, 5], "ignore_eos": False}
    for params, top_k in ((first, -1), (second, 5)):
        assert len(params) == 3 and all(wanted.items() <= one.items() and one["top_k"] == top_k for one in params)


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


@pytest.mark.slow
def test_no_answer_at_all_ends_the_job(stand_in, drive):
    """A server that lives and keeps one prompt for ever is found out by the prompt's own time."""
    server = stand_in()
    server.faults.append(("never", None))
    driver = drive([server], request_timeout_s=1.0)
    with pytest.raises(RunError, match="request_timeout_s = 1: .*no answer in 1 s"):
        driver.run(REQUESTS[:1])


def test_new_weights_in_the_middle_of_an_answer(stand_in, drive):
    """Each token has the version that made it; what came before the update is not thrown away."""
    server = stand_in()
    driver = drive([server])
    server.hold_at = 5
    job = Job([Request([2, 3], 2, 60)])
    driver.loop.call(driver.dispatcher.add(job, Sampling(60), 1))
    while server.held < 2:
        time.sleep(0.01)
    driver.push(version=1)
    server.hold_at = None
    for rollout in driver.finish(job)[0]:
        assert list(rollout.versions) == [(0, 5), (1, 55)]
        assert len(rollout.response) == 60
    assert driver.counts == {}


def test_held_prompts_wait(stand_in, drive):
    """Where answers under way are waited for before an update, new ones must not begin."""
    server = stand_in()
    driver = drive([server], concurrency=4)
    server.paused = True
    job = driver.start()
    while len(server.asked("/generate")) < 4:
        time.sleep(0.01)
    driver.loop.call(driver.dispatcher.set_hold(True))
    server.paused = False
    driver.until(driver.dispatcher.is_idle)
    assert 0 < job.left < len(REQUESTS)
    assert len(server.asked("/generate")) == 4
    driver.push(version=1)
    assert len(server.asked("/generate")) == 4
    driver.loop.call(driver.dispatcher.set_hold(False))
    assert content(driver.finish(job)) == expected()
    versions = [{version for rollout in of for version, _ in rollout.versions} for of in job.answers]
    assert versions == [{0}] * 4 + [{1}] * 16


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
