"""Dispatch and health with servers that are not SGLang: all that they need is rollout/server_client.py's protocol."""

from __future__ import annotations

import asyncio
from typing import Any

from flowrl_mega.config import RolloutSettings
from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.dispatch import Dispatcher, Job
from flowrl_mega.rollout.engine import Request, Rollout
from flowrl_mega.rollout.health import Gateway, ServerState
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.server_client import Malformed


class InMemory:
    """A server without HTTP, whose answers say who was asked for what. Its first `failures` requests fail."""

    def __init__(self, url: str, failures: int = 0) -> None:
        self.url, self.failures, self.asked, self.closed = url, failures, 0, False

    async def generate(self, request: Request, sampling: Sampling, seeds: list[int], timeout_s: float) -> Any:
        self.asked += 1
        await asyncio.sleep(0)
        if self.failures:
            self.failures -= 1
            raise ServerError(self.url, "not today", 503)
        return [[*request.prompt, seed % 7] for seed in seeds]

    def read_answers(self, response: Any, request: Request, vocab: int, versions: range) -> list[Rollout]:
        if len(response) != request.answers:
            raise Malformed(f"{len(response)} answers")
        return [Rollout(ids, [0.0] * len(ids), "stop", [(versions[-1], len(ids))]) for ids in response]

    async def health(self, timeout_s: float) -> None: ...

    async def abort_request(self, timeout_s: float) -> None: ...

    async def continue_generation(self, timeout_s: float) -> None: ...

    async def flush_cache(self, timeout_s: float) -> None: ...
    async def release_memory_occupation(self, tags: list[str], timeout_s: float) -> None: ...

    async def resume_memory_occupation(self, tags: list[str], timeout_s: float) -> None: ...

    async def close(self) -> None:
        self.closed = True


def test_other_servers_get_prompts_retries_and_versions() -> None:
    """Spread over both, one of which fails twice; all answers are of the version that was pushed."""
    servers = [InMemory("one", failures=2), InMemory("two")]
    requests = [Request([i], 2, 4) for i in range(8)]

    async def run() -> tuple[Job, dict[str, int]]:
        gateways = [Gateway(server, [ServerState(server)]) for server in servers]
        dispatcher = Dispatcher(RolloutSettings(engine="sglang", concurrency=2), gateways, 101, None)
        await dispatcher.open()
        clients = await dispatcher.before_push(None, 3)
        await dispatcher.health.after_push([client.url for client in clients], 3, {})
        await dispatcher.add(job := Job(requests), Sampling(4), seed=1)
        assert await dispatcher.next(lambda: not job.left, 20.0) == ("done", [])
        counts = dispatcher.taken_counts()
        await dispatcher.close()
        return job, counts

    job, counts = asyncio.run(run())
    for request, answers in zip(requests, job.answers, strict=True):
        assert answers and [answer.response[0] for answer in answers] == [request.prompt[0]] * 2
        assert {answer.versions[0] for answer in answers} == {(3, 2)}
    assert all(server.asked and server.closed for server in servers)
    assert counts["failed_requests"] == counts["retries"] == 2
