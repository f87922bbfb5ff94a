"""The engine as ranks use it together: the same answers and the same errors on all, however long servers take."""

from __future__ import annotations

import asyncio
import dataclasses
import os
import time
from pathlib import Path
from typing import Any

import on_ranks
import pytest
import torch
import torch.distributed as dist
from driving import content, expected
from rank_pool import RankFailed

from flowrl_mega.config import ConfigError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.answers import broadcast_answers
from flowrl_mega.rollout.engine import Request, Rollout
from flowrl_mega.rollout.sglang import engine as sglang
from flowrl_mega.rollout.sglang import started
from flowrl_mega.rollout.sglang.endpoints import is_up
from flowrl_mega.rollout.sglang.engine import SglangEngine, check_request

pytestmark = pytest.mark.ranks
STOPS = (1, 17, 40, 41, 42, 77)
SAMPLING = Sampling(12, stop_ids=STOPS)
REQUESTS = [Request([i + 2, 3, 4], 3, 12) for i in range(20)]
LAYOUTS = {"tp2": {"tp": 2}, "dp2": {"dp": 2}}


def engine_for(path: Path, folder: Path, urls: list[str], parallel: dict[str, int], **rollout: Any):
    """In a rank: a policy, and an engine attached to these servers. Weights go by files, which a stand-in can take."""
    rollout = {
        "engine": "sglang", "servers": urls, "request_timeout_s": 20, **rollout,
        "sync": {"transfer": "disk", "checksum_every": 0, **rollout.get("sync", {})},
    }  # fmt: skip
    sections = {"parallel": parallel, "rollout": rollout, "run_dir": str(folder)}
    policy = on_ranks.build(path, **sections)
    config = on_ranks.config_for(path, **sections)
    side_files = {"config.json": (path / "config.json").read_bytes()}
    return policy, SglangEngine(config, policy.layout, policy.arch, side_files, 0)


def two_steps(path: Path, folder: Path, urls: list[str], parallel: dict[str, int], **rollout: Any):
    """Answers to a job that an update comes into the middle of, and to one after it."""
    policy, engine = engine_for(path, folder, urls, parallel, **rollout)
    try:
        synced = [engine.sync(policy, version=3)]
        job = engine.start(REQUESTS, SAMPLING, seed=7)
        time.sleep(0.3)
        synced.append(engine.sync(policy, version=4))
        first = engine.finish(job)
        reported: list[tuple[int, int, list[int]]] = []
        on_answer = lambda request, i, rollout: reported.append((request, i, rollout.response))  # noqa: E731
        second = engine.finish(engine.start(REQUESTS, SAMPLING, 9, on_answer))
        return (first, second, synced, engine.metrics()), reported
    finally:
        engine.close()


@pytest.mark.parametrize("pause", ["retract", "wait"])
@pytest.mark.parametrize("parallel", LAYOUTS)
def test_all_ranks_get_the_same_answers(parallel, pause, tiny_llama, stand_in, ranks2, tmp_path):
    """Those of the servers, with log-probs rounded alike on the rank that asked; and all see the same metrics."""
    servers = [stand_in(token_s=0.03), stand_in(token_s=0.03)]
    urls = [server.url for server in servers]
    (one, reported), (other, nothing) = ranks2.run(
        two_steps, tiny_llama, tmp_path, urls, LAYOUTS[parallel], concurrency=3, sync={"pause": pause}
    )
    assert one == other
    first, second, synced, metrics = one
    for answers, seed in ((first, 7), (second, 9)):
        for got, wanted in zip(content(answers), expected(seed=seed), strict=True):
            for (tokens, logp), (right_tokens, right_logp) in zip(got, wanted, strict=True):
                assert tokens == right_tokens
                assert logp == pytest.approx(right_logp, abs=1e-7)
    answers = [(request, i, rollout.response) for request, of in enumerate(second) for i, rollout in enumerate(of)]
    assert sorted(reported) == answers, "the rank that asks hears of each answer once"
    assert nothing == []
    spans = [rollout.versions for of in first for rollout in of]
    assert all(sum(length for _, length in of) > 0 for of in spans)
    versions = [[version for version, _ in of] for of in spans]
    assert [4] in versions, "what was in the queue"
    assert ([3, 4] in versions) == (pause == "retract"), "waiting means that no answer is of two versions"
    assert {version for of in second for rollout in of for version, _ in rollout.versions} == {4}
    assert all(sync["perf/push_seconds"] > 0 for sync in synced)
    assert set(metrics.values()) == {0.0}
    for server in servers:
        assert [kind for kind, _ in server.given] == ["disk", "disk"]
        paused = [body["mode"] for body in server.asked("/pause_generation")]
        assert paused == (["retract"] * 2 if pause == "retract" else [])


def many_orders(path: Path, folder: Path, urls: list[str]) -> int:
    """How often a rank that waits has heard from rank 0."""
    policy, engine = engine_for(path, folder, urls, {"dp": 2})
    real, heard, sglang.ORDER_S = engine.layout.broadcast_from_rank0, [], 0.05

    class Counting:
        rank, world = engine.layout.rank, 2

        def broadcast_from_rank0(self, item: Any) -> Any:
            heard.append(1)
            return real(item)

    try:
        engine.sync(policy, version=0)
        engine.layout = Counting()
        engine.finish(engine.start(REQUESTS[:1], SAMPLING, seed=7))
    finally:
        sglang.ORDER_S = 5.0
        engine.close()
    return len(heard)


def test_ranks_that_wait_hear_from_the_first(tiny_llama, stand_in, ranks2, tmp_path):
    """Generation may take longer than any collective is allowed to: nobody sits in one that long."""
    server = stand_in(token_s=0.1)
    counts = ranks2.run(many_orders, tiny_llama, tmp_path, [server.url])
    assert min(counts) > 4, "a word every 0.05 s, in half a second at the least"


def one_job(path: Path, folder: Path, urls: list[str]):
    policy, engine = engine_for(path, folder, urls, {"tp": 2}, hang_s=2)
    try:
        engine.sync(policy, version=3)
        return engine.finish(engine.start(REQUESTS, SAMPLING, seed=7)), engine.metrics()
    finally:
        engine.close()


def test_a_server_that_comes_back_gets_weights_from_all_ranks(tiny_llama, stand_in, ranks2, tmp_path):
    """In the middle of a job, when the other ranks only wait for answers."""
    server = stand_in()
    server.faults.append(("die", 0.1))
    one, other = ranks2.run(one_job, tiny_llama, tmp_path, [server.url])
    assert one == other
    answers, metrics = one
    assert [[tokens for tokens, _ in of] for of in content(answers)] == [[t for t, _ in of] for of in expected()]
    assert {version for of in answers for rollout in of for version, _ in rollout.versions} == {3}
    assert metrics["rollout/servers_lost"] + metrics["rollout/stale_answers"] >= 1
    assert len(server.given) == 1 and server.version == "3", "what it had before, it forgot"


class StandsFor:
    """This node's fleet, whose only server is a stand-in that another process runs."""

    def __init__(self, settings: Any, model: Path, folder: Path, *_: Any, host: str) -> None:
        node = 1 if folder.name == "node_1" else 0
        assert (model / "config.json").is_file() and host == "127.0.0.1"
        self.folder, self.urls = folder, [settings.server_args["urls"][node]]

    def start(self) -> None:
        (self.folder / "started").touch()

    def is_alive(self, url: str) -> bool:
        return is_up(url)

    def restart(self, url: str) -> None:
        assert url in self.urls
        with (self.folder / "restarted").open("a") as file:
            print(os.environ["RANK"], file=file)
        while not is_up(url):
            time.sleep(0.02)

    def close(self) -> None:
        (self.folder / "closed").touch()


def on_two_nodes(path: Path, folder: Path, urls: list[str], parallel: dict[str, int]):
    """Each rank is the first, and only one, of its node."""
    here, os.environ["LOCAL_RANK"] = os.environ["LOCAL_RANK"], "0"
    real, started.Fleet = started.Fleet, StandsFor
    try:
        policy, engine = engine_for(path, folder, 1, parallel, server_args={"urls": urls}, concurrency=2, hang_s=2)
        try:
            engine.sync(policy, version=3)
            return engine.finish(engine.start(REQUESTS, SAMPLING, seed=7)), engine.metrics()
        finally:
            engine.close()
    finally:
        os.environ["LOCAL_RANK"], started.Fleet = here, real


@pytest.mark.parametrize("parallel", LAYOUTS)
def test_a_server_is_started_again_by_its_own_node(parallel, tiny_llama, stand_in, ranks2, tmp_path):
    """All answers come, from the servers of both nodes, though the second one's dies with prompts under way."""
    servers = [stand_in(token_s=0.01), stand_in(token_s=0.01)]
    servers[1].faults.append(("die", 1.0))
    second = tmp_path / "servers" / "node_1"
    one, other = ranks2.run(on_two_nodes, tiny_llama, tmp_path, [s.url for s in servers], LAYOUTS[parallel])
    assert one == other
    answers, metrics = one
    assert [[tokens for tokens, _ in of] for of in content(answers)] == [[t for t, _ in of] for of in expected()]
    assert metrics["rollout/restarts"] == 1 and (second / "restarted").read_text() == "1\n"
    assert all(server.version == "3" for server in servers)
    assert all(server.asked("/generate") for server in servers)
    for folder in (tmp_path / "servers", second):
        assert (folder / "started").exists() and (folder / "closed").exists()


def errors(path: Path, folder: Path, urls: list[str], requests: list[Request]) -> tuple[str, str]:
    """What a rank raises, and that the ranks can go on together after it."""
    policy, engine = engine_for(path, folder, urls, {"dp": 2}, request_timeout_s=0.5)
    try:
        engine.sync(policy, version=0)
        try:
            engine.finish(engine.start(requests, SAMPLING, seed=7))
        except Exception as error:
            found = type(error).__name__, str(error)
        dist.barrier()
    finally:
        engine.close()
    return found


def test_all_ranks_raise_what_rank_0_meets(tiny_llama, stand_in, ranks2, tmp_path):
    """A rank that does not hear of the end of the job would wait for its time-out."""
    server = stand_in()
    server.faults.extend([("status", 500)] * 100)
    one, other = ranks2.run(errors, tiny_llama, tmp_path, [server.url], REQUESTS)
    assert one == other
    assert one[0] == "RunError" and server.url in one[1]


def test_the_servers_context_is_known_to_all(tiny_llama, stand_in, ranks2, tmp_path):
    """A prompt that does not fit is found before anything is sent, and by the name of what to change."""
    servers = [stand_in(context=128), stand_in(context=40)]
    one, other = ranks2.run(
        errors, tiny_llama, tmp_path, [server.url for server in servers], [*REQUESTS, Request([2] * 30, 1, 11)]
    )
    assert one == other
    assert one[0] == "ConfigError"
    assert "rollout.max_tokens = 11: 41 with a prompt of 30 tokens, but the servers take 40" in one[1]
    assert not any(server.asked("/generate") for server in servers)


def test_a_server_that_does_not_answer_at_the_start(tiny_llama, ranks2, tmp_path):
    """All ranks say so; none waits for the others."""
    with pytest.raises(RankFailed, match="rollout.servers: http://127.0.0.1:9: .*is the server up"):
        ranks2.run(two_steps, tiny_llama, tmp_path, ["http://127.0.0.1:9"], {"dp": 2})


@pytest.mark.parametrize(
    "request_, message",
    [
        (Request([], 1, 4), "a prompt has no tokens"),
        (Request([2, 101], 1, 4), "token id 101, outside the model's vocabulary of 101"),
        (Request([-1, 2], 1, 4), "token id -1, outside"),
        (Request([2] * 7, 1, 4), "11 with a prompt of 7 tokens, but the servers take 10"),
    ],
)
def test_prompts_that_would_kill_a_server(request_, message):
    """The real one dies of an empty prompt and of an unknown id, and takes all that it is at with it."""
    with pytest.raises(ConfigError, match=message):
        check_request(request_, vocab=101, context=10)


def test_prompts_that_just_fit():
    """The first and the last id, and the whole context."""
    check_request(Request([0, 100, 3, 4, 5, 6], 1, 4), vocab=101, context=10)


def shared(answers: list[list[Rollout]], requests: list[Request]) -> list[list[Rollout]]:
    on_ranks.layouts.init(on_ranks.config_for("unused").parallel, 0)
    first = dist.get_rank() == 0
    return broadcast_answers(answers if first else None, requests, first)


def test_answers_travel_whole(ranks2):
    """Of all lengths, of several versions, and none at all."""
    answers = [
        [Rollout([1, 2, 3], [-0.5, -0.25, -0.0], "stop", [(7, 1), (9, 2)])],
        [Rollout([100_000], [-17.5], "length", [(2**31 - 1, 1)]), Rollout([4, 4], [-1.0, -2.0], "stop", [(0, 2)])],
    ]
    requests = [Request([1], 1, 5), Request([1], 2, 5)]
    assert ranks2.run(shared, answers, requests) == [answers, answers]
    assert ranks2.run(shared, [], []) == [[], []]


def release_and_sync(path: Path, folder: Path, url: str) -> None:
    """A colocated trainer's step, as if on GPUs: rank 1 is slow to let go of what its allocator keeps."""
    policy, engine = engine_for(path, folder, [url], {"dp": 2})
    rank = engine.layout.rank
    engine.settings = engine.settings.model_copy(update={"colocated": True})
    engine.layout = dataclasses.replace(engine.layout, device=torch.device("cuda"))

    def note(what: str) -> None:
        with (folder / "events").open("a") as file:
            print(what, file=file)

    def empty_cache() -> None:
        time.sleep(0.5 * rank)
        note(f"emptied {rank}")

    torch.cuda.synchronize = lambda *_: note(f"synchronized {rank}")
    real, torch.cuda.empty_cache = torch.cuda.empty_cache, empty_cache
    try:
        engine.sync(policy, version=1)
        engine.release()
        note(f"released {rank}")
        engine.sync(policy, version=2)
    finally:
        torch.cuda.empty_cache = real
        engine.close()


def test_memory_is_let_go_of_on_all_ranks_before_a_server_takes_it(tiny_llama, stand_in, ranks2, tmp_path):
    """And no rank goes on before the servers have let go of theirs."""
    server = stand_in()
    for what in ("resume", "release"):
        real = getattr(server, f"do_{what}_memory_occupation")

        async def noting(body: Any, what: str = what, real: Any = real) -> Any:
            await asyncio.sleep(0.3)
            with (tmp_path / "events").open("a") as file:
                print(f"server: {what} {body['tags'][0]}", file=file)
            return await real(body)

        setattr(server, f"do_{what}_memory_occupation", noting)
    ranks2.run(release_and_sync, tiny_llama, tmp_path, server.url)
    events = (tmp_path / "events").read_text().splitlines()
    at = events.index("server: release kv_cache")
    assert all(events.index(f"released {rank}") > at for rank in range(2))
    later = events[at:]
    resumed = later.index("server: resume weights")
    for rank in range(2):
        assert later.index(f"synchronized {rank}") < later.index(f"emptied {rank}") < resumed
