"""Servers that die, hang, have other weights or refuse them: what becomes of them, and of the prompts that they had."""

from __future__ import annotations

import time

import pytest
from driving import REQUESTS, Ours, content, expected

from flowrl_mega.config import RunError

pytestmark = pytest.mark.slow


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
    assert refused.consecutive_refusals == 3
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


def test_memory_is_given_back_when_the_server_is_idle(stand_in, drive):
    """With overlapping scheduling one more decoding step is in progress when the last answer has come."""
    server = stand_in()
    driver = drive([server])
    driver.push(version=1)
    server.lags_s = 0.3
    assert content(driver.run()) == expected()
    driver.loop.call(driver.dispatcher.health.release())
    assert server.memory == set() and driver.counts.get("servers_lost", 0) == 0
    assert time.monotonic() >= server.idle_at


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
