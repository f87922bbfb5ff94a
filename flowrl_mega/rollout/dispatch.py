"""Sends prompts to servers: queues them, picks the least loaded server, retries, and requeues those of a dead server.

Knows no wire format: servers are ServerClients. Everything here runs in the one thread of a LoopThread; the trainer's
thread calls coroutines of `Dispatcher`.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

from flowrl_mega.config import ConfigError, RolloutSettings, RunError
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.answers import answer_seeds
from flowrl_mega.rollout.engine import AnswerCallback, Request, Rollout
from flowrl_mega.rollout.health import LAST_BACKOFF_S, Background, Gateway, Health, Restarter, quietly
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.server_client import Malformed, ServerClient, Stale

FIRST_BACKOFF_S = 0.1
COUNTED = ("failed_requests", "malformed", "retries", "stale_answers", "servers_lost", "restarts")


@dataclass(eq=False)
class Job:
    """Requests and their answers: `answers[i]` are those to `requests[i]`, None until they are complete."""

    requests: list[Request]
    on_answer: AnswerCallback | None = None
    answers: list[list[Rollout] | None] = field(default_factory=list)
    left: int = 0  # requests without answers


@dataclass(eq=False)
class Task:
    """One request being sent. `seconds` is the time spent on it so far, without the time in the queue."""

    job: Job
    request_index: int
    sampling: Sampling
    seeds: list[int]  # one per answer
    attempts: int = 0
    seconds: float = 0.0

    @property
    def request(self) -> Request:
        return self.job.requests[self.request_index]


class Dispatcher:
    """`newest` is the latest version that servers have been, or are being, given; with `any_weights` they keep those
    that they were started with, and answers are not asked for their version."""

    def __init__(
        self,
        settings: RolloutSettings,
        gateways: list[Gateway],
        vocab: int,
        restarter: Restarter | None,
        any_weights: bool = False,
    ) -> None:
        self.any_weights = any_weights
        self.settings, self.gateways, self.vocab, self.restarter = settings, gateways, vocab, restarter
        self.background = Background()
        self.health = Health(settings, gateways, restarter, self.background, self._requeue, self._pump)
        self.queue: deque[Task] = deque()
        self.newest = -1
        self.hold = False

    async def open(self) -> None:
        """Start watching the servers."""
        self.background.spawn(self.health.watch())

    async def add(self, job: Job, sampling: Sampling, seed: int | list[list[int]]) -> None:
        """Queue a job's requests. `seed`: what those of the answers are drawn from, or theirs, one list per request."""
        job.answers, job.left = [None] * len(job.requests), len(job.requests)
        for index, seeds in enumerate(answer_seeds(job.requests, seed) if isinstance(seed, int) else seed):
            self.queue.append(Task(job, index, sampling, seeds))
        self._pump()

    async def next(self, done: Callable[[], bool], seconds: float, heal: bool = True) -> tuple[str, list[str]]:
        """What the trainer has to do next: "push" weights to the servers at these URLs (only with `heal`), "wait", or
        continue because all is "done". Returns within `seconds`; raises the fault that ends the job, if there is one.
        """
        end = time.monotonic() + seconds
        while True:
            self.background.changed.clear()
            if self.background.fault:
                raise self.background.fault
            if done():
                return "done", []
            if heal and (stale := self.health.stale()):
                return "push", stale
            left = end - time.monotonic()
            if left <= 0:
                return "wait", []
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.background.changed.wait(), left)

    def is_idle(self) -> bool:
        return not any(gateway.under_way for gateway in self.gateways)

    def has_server(self) -> bool:
        return any(server.state == "ready" for server in self.health.servers)

    async def set_hold(self, hold: bool) -> None:
        """While `hold` is set, nothing is taken from the queue."""
        self.hold = hold
        self._pump()

    async def before_push(self, urls: list[str] | None, version: int) -> list[ServerClient]:
        """The servers to push `version` to, as `Health.before_push`."""
        self.newest = version
        return await self.health.before_push(urls)

    def taken_counts(self) -> dict[str, int]:
        """Counts since the last call, by name."""
        counts = {name: self.background.counts[name] for name in COUNTED}
        self.background.counts.subtract(counts)
        return counts

    async def close(self) -> None:
        """Stop all requests; servers that others run are told to abort them."""
        self.hold = True
        await self.background.stop()
        for gateway in self.gateways:
            if gateway.under_way and not self.restarter:
                for server in gateway.servers:
                    await quietly(server.client.abort_request)
        for client in {gateway.client for gateway in self.gateways} | {server.client for server in self.health.servers}:
            await client.close()

    def _pump(self) -> None:
        """Send what the servers have room for."""
        limit = self.settings.concurrency
        while self.queue and not self.hold:
            free = [gateway for gateway in self.gateways if gateway.is_open and len(gateway.under_way) < limit]
            if not free:
                return
            gateway = min(free, key=lambda gateway: len(gateway.under_way))
            if not gateway.under_way:
                gateway.heard = time.monotonic()
            task = self.queue.popleft()
            gateway.under_way[task] = self.background.spawn(self._send(task, gateway, gateway.version))

    async def _send(self, task: Task, gateway: Gateway, version: int) -> None:
        """One attempt. Ends with the answers in the job, the request queued again, or a fault."""
        start, limit = time.monotonic(), self.settings.request_timeout_s - task.seconds
        try:
            response = await gateway.client.generate(task.request, task.sampling, task.seeds, limit)
            # An update may have come in the middle of the answer.
            versions = None if self.any_weights else range(version, self.newest + 1)
            answers = gateway.client.read_answers(response, task.request, self.vocab, versions)
        except Stale as error:
            self.health.is_stale(gateway, str(error))  # requeues this request, too
        except (ServerError, Malformed) as error:
            task.seconds += time.monotonic() - start
            self._failed(task, gateway, error)
        else:
            self.health.has_answered(gateway)
            task.job.answers[task.request_index] = answers
            if task.job.on_answer:
                for i, answer in enumerate(answers):
                    task.job.on_answer(task.request_index, i, answer)
            task.job.left -= 1
        gateway.under_way.pop(task, None)
        self._pump()
        if not task.job.left or not gateway.under_way:
            self.background.changed.set()

    def _failed(self, task: Task, gateway: Gateway, error: ServerError | Malformed) -> None:
        """Queue the request again after a growing pause, unless a retry cannot help."""
        url, tokens = gateway.client.url, len(task.request.prompt)
        if isinstance(error, ServerError) and error.is_refusal:
            why = f"{url} refuses a prompt of {tokens} tokens: {error.message}"
            self.background.fail(ConfigError(f"rollout.servers: {why}"))
            return
        message = error.message if isinstance(error, ServerError) else f"malformed answer, {error}"
        self.background.counts["malformed" if isinstance(error, Malformed) else "failed_requests"] += 1
        pause = min(LAST_BACKOFF_S, FIRST_BACKOFF_S * 2 ** min(task.attempts, 20)) * random.uniform(0.5, 1.0)
        task.attempts += 1
        task.seconds += pause
        limit = self.settings.request_timeout_s
        if task.seconds >= limit:
            self.background.fail(
                RunError(
                    f"rollout.request_timeout_s = {limit:g}: a prompt of {tokens} tokens has no answer after so long "
                    f"and {task.attempts} attempts, the last at {url}: {message}; allow more, or see the server's log"
                )
            )
            return
        if isinstance(error, ServerError) and not error.status:
            self.health.examine(gateway)
        asyncio.get_running_loop().call_later(pause, self._again, task)

    def _again(self, task: Task) -> None:
        self.background.counts["retries"] += 1
        self.queue.appendleft(task)
        self._pump()

    def _requeue(self, gateway: Gateway) -> None:
        """Queue again, first, everything that a gateway is working on."""
        this = asyncio.current_task()
        for task, sending in gateway.under_way.items():
            if sending is not this:
                sending.cancel()
            self.background.counts["retries"] += 1
            self.queue.appendleft(task)
        gateway.under_way.clear()
