"""Tracks the servers: which weights they have, whether they are alive, and how they come back.

Knows no wire format: servers are ServerClients. Everything here runs in the one thread of a LoopThread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from typing import Any, Literal, Protocol

from flowrl_mega.config import ConfigError, RolloutSettings, RunError
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.server_client import ServerClient

LAST_BACKOFF_S = 30.0
PROBE_S = 25.0  # SGLang itself gives its model 20 s before it calls itself ill
QUIET_S = 5.0  # for requests that may fail
MOST_FAILURES = 3  # consecutive ones of a server: losses, or weight updates that it refused


class Restarter(Protocol):
    """Restarts the servers that this job has started."""

    def is_alive(self, url: str) -> bool:
        """Whether the server's process exists. Blocks; raises RunError where nobody can say."""

    def restart(self, url: str) -> None:
        """Kill what is left of the server and start it again. Blocks; raises ConfigError and RunError."""


class ServerState:
    """A server, which holds a copy of the weights. `version` is that of the last ones it took."""

    def __init__(self, client: ServerClient) -> None:
        self.client, self.url, self.version = client, client.url, -1
        self.state: Literal["stale", "ready", "down", "refused"] = "stale"  # stale: alive, but needs weights
        self.why = "has had no weights yet"  # the reason for the state, in words
        self.syncing = self.asleep = False
        self.consecutive_losses = self.consecutive_refusals = 0


class Gateway:
    """A URL that takes prompts: a server, or a router in front of several. `under_way`: what it is working on."""

    def __init__(self, client: ServerClient, servers: list[ServerState]) -> None:
        self.client, self.servers = client, servers
        self.is_router = all(server.client is not client for server in servers)
        self.under_way: dict[Any, asyncio.Task[None]] = {}
        self.heard = 0.0  # time of its last sign of life
        self.examination: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it may be sent prompts."""
        states = {server.state for server in self.servers}
        syncing = any(server.syncing for server in self.servers)
        return "ready" in states and "stale" not in states and not syncing and self.examination is None

    @property
    def version(self) -> int:
        """The oldest version that may answer a prompt sent now."""
        return min(server.version for server in self.servers if server.state == "ready")


class Background:
    """Tasks that nobody awaits. `fault` is the error that ends the job; `changed` is set when anything happened."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.fault: BaseException | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    def spawn(self, coroutine: Any) -> asyncio.Task[None]:
        """Run a coroutine as a task; an exception in it becomes the job's fault."""
        task = asyncio.ensure_future(coroutine)
        self.tasks.add(task)
        task.add_done_callback(self._ended)
        return task

    def fail(self, error: BaseException) -> None:
        self.fault = self.fault or error
        self.changed.set()

    async def stop(self) -> None:
        tasks = [task for task in self.tasks if not task.done()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self.tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            self.fail(error)


class Health:
    """The state of all servers. Calls `requeue(gateway)` when a gateway's prompts must go elsewhere, and `pump()` when
    there may be room for prompts. `restarter` is None where others run the servers."""

    def __init__(
        self,
        settings: RolloutSettings,
        gateways: list[Gateway],
        restarter: Restarter | None,
        background: Background,
        requeue: Callable[[Gateway], None],
        pump: Callable[[], None],
    ) -> None:
        self.settings, self.gateways, self.restarter, self.background = settings, gateways, restarter, background
        self.requeue, self.pump = requeue, pump
        self.servers = [server for gateway in gateways for server in gateway.servers]
        self.none_since = time.monotonic()

    def up(self) -> list[ServerState]:
        """The servers that are alive."""
        return [server for server in self.servers if server.state in ("ready", "stale")]

    def stale(self) -> list[str]:
        """The URLs of servers that are alive and need weights."""
        return [server.url for server in self.servers if server.state == "stale"]

    async def before_push(self, urls: list[str] | None) -> list[ServerClient]:
        """The servers at these URLs (None: all that are up), ready for a push. Until `after_push` they get no prompts,
        and silence does not count against them."""
        chosen = [server for server in self.up() if urls is None or server.url in urls]
        for server in chosen:
            server.syncing = True
        await self._set_memory("resume", ["weights"], [server for server in chosen if server.asleep])
        return [server.client for server in chosen]

    async def after_push(self, urls: list[str], version: int, failures: dict[str, str]) -> None:
        """Note which of these servers took `version`; `failures` says why others did not, by URL."""
        chosen = [server for server in self.servers if server.url in urls]
        await self._set_memory("resume", ["kv_cache"], [server for server in chosen if server.asleep])
        for server in chosen:
            server.syncing = server.asleep = False
            self._gateway(server).heard = time.monotonic()
            if server.url in failures:
                server.consecutive_refusals += 1
                why = f"did not take the weights: {failures[server.url]}"
                self.lose(server, why, for_good=server.consecutive_refusals >= MOST_FAILURES)
            elif server.state in ("ready", "stale"):  # it may have died since
                server.state, server.version, server.consecutive_refusals = "ready", version, 0
        self.pump()
        self.background.changed.set()

    async def release(self) -> None:
        """Have all servers free their device memory until the next push."""
        awake = [server for server in self.up() if not server.asleep]
        await self._set_memory("release", ["kv_cache", "weights"], awake)
        for server in awake:
            server.asleep = True

    async def _set_memory(
        self, what: Literal["release", "resume"], tags: list[str], servers: list[ServerState]
    ) -> None:
        """Release or resume the memory of `tags`; a server that fails at it is lost. It releases nothing before the
        last decoding step, which may follow the last answer, is over: SGLang ends where it is asked sooner."""

        async def ask(server: ServerState) -> None:
            client = server.client
            set_memory = client.release_memory_occupation if what == "release" else client.resume_memory_occupation
            try:
                if what == "release":
                    await client.flush_cache(self.settings.sync.timeout_s)
                await set_memory(tags, self.settings.sync.timeout_s)
            except ServerError as error:
                self.lose(server, f"did not {what} its memory ({error.message})")

        await asyncio.gather(*map(ask, servers))

    def has_answered(self, gateway: Gateway) -> None:
        """Note that a gateway has answered a prompt."""
        gateway.heard = time.monotonic()
        for server in gateway.servers:
            server.consecutive_losses = 0

    def is_stale(self, gateway: Gateway, why: str) -> None:
        """Note an answer generated by wrong weights: so will be the others that the server is working on."""
        self.background.counts["stale_answers"] += 1
        self.requeue(gateway)
        for server in gateway.servers:  # a router does not say which of its servers it was
            if server.state == "ready":
                server.state, server.why = "down", why
                self._say(f"server {server.url} {why}; it gets the weights again")
                self.background.spawn(self._drop_work(server))

    async def _drop_work(self, server: ServerState) -> None:
        """A server notices only after a while that nobody waits for its answers."""
        await quietly(server.client.abort_request)
        server.state = "stale"
        self.background.changed.set()

    def examine(self, gateway: Gateway) -> None:
        """Find out whether a gateway's servers are alive; it gets no prompts meanwhile."""
        if gateway.examination is None:
            gateway.examination = self.background.spawn(self._examine(gateway))

    async def _examine(self, gateway: Gateway) -> None:
        watched = [server for server in gateway.servers if server.state in ("ready", "stale") and not server.syncing]
        for server, why in zip(watched, await asyncio.gather(*map(self._illness, watched)), strict=True):
            if why and server.state in ("ready", "stale"):
                self.lose(server, why)
        gateway.heard = time.monotonic()
        gateway.examination = None
        self.pump()

    async def _illness(self, server: ServerState) -> str | None:
        """Why a server cannot be used, after two attempts; None if it is alive."""
        clients = {server.client, self._gateway(server).client}  # a router must be alive, too
        timeout_s = min(PROBE_S, max(2.0, self.settings.hang_s))
        why = ""
        for last in (False, True):
            if self.restarter and not await asyncio.to_thread(self.restarter.is_alive, server.url):
                return "has died"
            try:
                for client in clients:
                    await client.health(timeout_s)
                return None
            except ServerError as error:
                why = f"does not answer ({error.message})"
            if not last:
                await asyncio.sleep(0.5)
        return why

    def lose(self, server: ServerState, why: str, for_good: bool = False) -> None:
        """Stop using a server. It is restarted if it is ours, else polled until it is back; `for_good`: neither."""
        server.state, server.why = "down", why
        server.consecutive_losses += 1
        self.background.counts["servers_lost"] += 1
        self.requeue(self._gateway(server))
        often = f"for the {server.consecutive_losses}th time without an answer in between"
        if self.restarter and server.consecutive_losses > MOST_FAILURES:
            self.background.fail(RunError(f"rollout.servers: {server.url} {why}, {often}; see its log"))
        elif for_good or server.consecutive_losses > MOST_FAILURES:
            server.state = "refused"
            self._say(f"server {server.url} {why}; it is left out from now on")
            if all(other.state == "refused" for other in self.servers):
                self.background.fail(RunError(f"rollout.servers: {self.reasons()}"))
        elif self.restarter:
            self.background.spawn(self._restart(self.restarter, server))
        else:
            self._say(f"server {server.url} {why}; it is left out until it is back")
            self.background.spawn(self._return(server))
        self.pump()
        self.background.changed.set()

    async def _restart(self, restarter: Restarter, server: ServerState) -> None:
        self._say(f"server {server.url} {server.why}")
        try:
            await asyncio.to_thread(restarter.restart, server.url)
        except (ConfigError, RunError) as error:
            self.background.fail(error)
            return
        self.background.counts["restarts"] += 1
        server.state, server.why, server.asleep = "stale", "was started again", False
        self.background.changed.set()

    async def _return(self, server: ServerState) -> None:
        """Poll a server that others run until it is back. An update that broke off may have left it paused."""
        pause = 1.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            await quietly(server.client.continue_generation)
            if await self._illness(server) is None:
                break
            pause = min(LAST_BACKOFF_S, 2 * pause)
        server.state, server.why = "stale", "is back"
        self.background.changed.set()

    async def watch(self) -> None:
        """Examine servers that have work and are silent; end the job when none has been usable for too long."""
        limit = self.settings.request_timeout_s
        while True:
            await asyncio.sleep(min(1.0, self.settings.hang_s / 4))
            now = time.monotonic()
            for gateway in self.gateways:
                busy = gateway.under_way and not any(server.syncing for server in gateway.servers)
                if busy and now - gateway.heard > self.settings.hang_s:
                    self.examine(gateway)
            if self.up() or self.restarter:  # ours have start_timeout_s
                self.none_since = now
            elif now - self.none_since > limit:
                message = (
                    f"rollout.request_timeout_s = {limit:g}: no server could be used for so long: {self.reasons()}"
                )
                self.background.fail(RunError(message))

    def reasons(self) -> str:
        """Each server's URL and the reason for its state."""
        return "; ".join(f"{server.url} {server.why}" for server in self.servers)

    def _gateway(self, server: ServerState) -> Gateway:
        return next(gateway for gateway in self.gateways if server in gateway.servers)

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


async def quietly(request: Callable[[float], Awaitable[Any]]) -> None:
    """Make a request that may fail; it is given its time-out in seconds."""
    with contextlib.suppress(ServerError):
        await request(QUIET_S)
