"""Drives a dispatcher against stand-ins, as the engine does, without ranks or weights."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

from stand_in import StandIn, answer_tokens

from flowrl_mega.config import RolloutSettings
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.answers import answer_seeds
from flowrl_mega.rollout.dispatch import Dispatcher, Job
from flowrl_mega.rollout.engine import Request, Rollout
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.attached import connect

MADE: dict[str, StandIn] = {}  # by the test that runs, by URL
STOPS = (1, 17, 40, 41, 42, 77)
SAMPLING = Sampling(12, stop_ids=STOPS)
REQUESTS = [Request([i + 2, 3, 4], 3, 12) for i in range(20)]


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
        gateways = self.loop.call(connect(self.settings.servers, None))
        self.servers |= {server.url: MADE[server.url] for gateway in gateways for server in gateway.servers}
        self.dispatcher = Dispatcher(self.settings, gateways, 101, ours)
        self.loop.call(self.dispatcher.open())
        self.version = 0
        self.refusing: dict[str, str] = {}

    def push(self, urls: list[str] | None = None, version: int | None = None) -> None:
        """New weights, or the same again, as WeightSync would give them."""
        self.version = self.version if version is None else version
        clients = self.loop.call(self.dispatcher.before_push(urls, self.version))
        given = [client for client in clients if client.url not in self.refusing]
        for client in given:
            self.loop.call(client.continue_generation(30.0))
            self.servers[client.url].version = str(self.version)
        failures = {client.url: self.refusing[client.url] for client in clients if client not in given}
        self.loop.call(self.dispatcher.health.after_push([client.url for client in clients], self.version, failures))

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
