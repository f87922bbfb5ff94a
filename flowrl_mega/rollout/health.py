"""Which servers can be used: what weights they have, whether they live, and how they come back.

Everything here runs in the one thread of a LoopThread.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import sys
import time
from collections import Counter
from collections.abc import Callable
from typing import Any, Literal, Protocol

from flowrl_mega.config import ConfigError, RolloutSettings, RunError
from flowrl_mega.rollout.api import Api, ServerError

LAST_BACKOFF_S = 30.0
PROBE_S = 25.0  # SGLang itself gives its model 20 s before it calls itself ill
MOST_FAILURES = 3  # in a row: ends of a server, or updates that it did not take


class Keeper(Protocol):
    """What starts servers again, where they are ours."""

    def is_alive(self, url: str) -> bool: ...

    def restart(self, url: str) -> None: ...


class Server:
    """What holds a copy of the weights. `version` is the last that it took."""

    def __init__(self, api: Api) -> None:
        self.api, self.url, self.version = api, api.url, -1
        self.state: Literal["stale", "ready", "down", "refused"] = "stale"  # stale: lives, needs weights
        self.why = "has had no weights yet"
        self.syncing = self.asleep = False
        self.ends = self.refusals = 0  # in a row


class Entry:
    """Where prompts are sent: a server, or a router in front of several. `under_way`: what it is working on."""

    def __init__(self, api: Api, servers: list[Server]) -> None:
        self.api, self.servers = api, servers
        self.is_router = all(server.api is not api for server in servers)
        self.under_way: dict[Any, asyncio.Task[None]] = {}
        self.heard = 0.0  # when it last showed that it lives
        self.examination: asyncio.Task[None] | None = None

    @property
    def is_open(self) -> bool:
        """Whether it may be given prompts."""
        states = {server.state for server in self.servers}
        syncing = any(server.syncing for server in self.servers)
        return "ready" in states and "stale" not in states and not syncing and self.examination is None

    @property
    def version(self) -> int:
        """Answers to what is sent now are of this version or a later one."""
        return min(server.version for server in self.servers if server.state == "ready")


class Background:
    """Tasks that nobody waits for; `fault` is what ends the job, `changed` is set when something has happened."""

    def __init__(self) -> None:
        self.changed = asyncio.Event()
        self.fault: BaseException | None = None
        self.tasks: set[asyncio.Task[None]] = set()
        self.counts: Counter[str] = Counter()

    def spawn(self, coroutine: Any) -> asyncio.Task[None]:
        """What it raises ends the job."""
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
    """The state of all servers. `take_back(entry)` is called when what an entry is working on must go elsewhere, and
    `pump()` when there may be a place for prompts."""

    def __init__(
        self,
        settings: RolloutSettings,
        entries: list[Entry],
        keeper: Keeper | None,
        background: Background,
        take_back: Callable[[Entry], None],
        pump: Callable[[], None],
    ) -> None:
        self.settings, self.entries, self.keeper, self.background = settings, entries, keeper, background
        self.take_back, self.pump = take_back, pump
        self.servers = [server for entry in entries for server in entry.servers]
        self.none_since = time.monotonic()

    def up(self) -> list[Server]:
        return [server for server in self.servers if server.state in ("ready", "stale")]

    def stale(self) -> list[str]:
        """The URLs of servers that live and need weights."""
        return [server.url for server in self.servers if server.state == "stale"]

    async def before_push(self, urls: list[str] | None) -> list[Api]:
        """The servers at these URLs (None: all that are up) to push to; silence means nothing until `after_push`."""
        chosen = [server for server in self.up() if urls is None or server.url in urls]
        for server in chosen:
            server.syncing = True
        await self._set_memory("resume", ["weights"], [server for server in chosen if server.asleep])
        return [server.api for server in chosen]

    async def after_push(self, urls: list[str], version: int, failures: dict[str, str]) -> None:
        chosen = [server for server in self.servers if server.url in urls]
        await self._set_memory("resume", ["kv_cache"], [server for server in chosen if server.asleep])
        for server in chosen:
            server.syncing = server.asleep = False
            self._entry(server).heard = time.monotonic()
            if server.url in failures:
                server.refusals += 1
                why = f"did not take the weights: {failures[server.url]}"
                self.lose(server, why, for_good=server.refusals >= MOST_FAILURES)
            elif server.state in ("ready", "stale"):  # it may have died since
                server.state, server.version, server.refusals = "ready", version, 0
        self.pump()
        self.background.changed.set()

    async def release(self) -> None:
        """Let all servers give their memory back until the next push."""
        awake = [server for server in self.up() if not server.asleep]
        await self._set_memory("release", ["kv_cache", "weights"], awake)
        for server in awake:
            server.asleep = True

    async def _set_memory(self, what: str, tags: list[str], servers: list[Server]) -> None:
        """Release or resume; a server that fails at it is lost."""

        async def ask(server: Server) -> None:
            try:
                await server.api.post(f"/{what}_memory_occupation", {"tags": tags}, self.settings.sync.timeout_s)
            except ServerError as error:
                self.lose(server, f"did not {what} its memory ({error.message})")

        await asyncio.gather(*map(ask, servers))

    def has_answered(self, entry: Entry) -> None:
        entry.heard = time.monotonic()
        for server in entry.servers:
            server.ends = 0

    def is_stale(self, entry: Entry, why: str) -> None:
        """An answer was of wrong weights, and so are the others that the server is writing."""
        self.background.counts["stale_answers"] += 1
        self.take_back(entry)
        for server in entry.servers:  # which of a router's it was, nobody knows
            if server.state == "ready":
                server.state, server.why = "down", why
                self._say(f"server {server.url} {why}; it gets the weights again")
                self.background.spawn(self._drop_work(server))

    async def _drop_work(self, server: Server) -> None:
        """A server notices only after a while that nobody waits for its answers any more."""
        await quietly(server.api, "/abort_request", {"abort_all": True})
        server.state = "stale"
        self.background.changed.set()

    def examine(self, entry: Entry) -> None:
        """Find out whether its servers live; it gets no prompts meanwhile."""
        if entry.examination is None:
            entry.examination = self.background.spawn(self._examine(entry))

    async def _examine(self, entry: Entry) -> None:
        watched = [server for server in entry.servers if server.state in ("ready", "stale") and not server.syncing]
        for server, why in zip(watched, await asyncio.gather(*map(self._illness, watched)), strict=True):
            if why and server.state in ("ready", "stale"):
                self.lose(server, why)
        entry.heard = time.monotonic()
        entry.examination = None
        self.pump()

    async def _illness(self, server: Server) -> str | None:
        """Why a server cannot be used; None: it lives. Asked twice."""
        entry = self._entry(server)
        apis = {server.api, entry.api}  # a router must live, too
        timeout_s = min(PROBE_S, max(2.0, self.settings.hang_s))
        why = ""
        for last in (False, True):
            if self.keeper and not self.keeper.is_alive(server.url):
                return "has died"
            try:
                for api in apis:
                    await api.get("/health", timeout_s)
                return None
            except ServerError as error:
                why = f"does not answer ({error.message})"
            if not last:
                await asyncio.sleep(0.5)
        return why

    def lose(self, server: Server, why: str, for_good: bool = False) -> None:
        """Take a server out; it is started again if it is ours, else tried again."""
        server.state, server.why = "down", why
        server.ends += 1
        self.background.counts["servers_lost"] += 1
        self.take_back(self._entry(server))
        often = f"for the {server.ends}th time without an answer in between"
        if self.keeper and server.ends > MOST_FAILURES:
            self.background.fail(RunError(f"rollout.servers: {server.url} {why}, {often}; see its log"))
        elif for_good or server.ends > MOST_FAILURES:
            server.state = "refused"
            self._say(f"server {server.url} {why}; it is left out from now on")
            if all(other.state == "refused" for other in self.servers):
                self.background.fail(RunError(f"rollout.servers: {self.reasons()}"))
        elif self.keeper:
            self.background.spawn(self._restart(self.keeper, server))
        else:
            self._say(f"server {server.url} {why}; it is left out until it is back")
            self.background.spawn(self._return(server))
        self.pump()
        self.background.changed.set()

    async def _restart(self, keeper: Keeper, server: Server) -> None:
        self._say(f"server {server.url} {server.why}")
        try:
            await asyncio.to_thread(keeper.restart, server.url)
        except (ConfigError, RunError) as error:
            self.background.fail(error)
            return
        self.background.counts["restarts"] += 1
        server.state, server.why, server.asleep = "stale", "was started again", False
        self.background.changed.set()

    async def _return(self, server: Server) -> None:
        """Until a server that others run is back. An update that broke off may have left it paused."""
        pause = 1.0
        while True:
            await asyncio.sleep(pause * random.uniform(0.5, 1.0))
            await quietly(server.api, "/continue_generation")
            if await self._illness(server) is None:
                break
            pause = min(LAST_BACKOFF_S, 2 * pause)
        server.state, server.why = "stale", "is back"
        self.background.changed.set()

    async def watch(self) -> None:
        """Ask servers that have work and are silent whether they live; end the job when none has for too long."""
        limit = self.settings.request_timeout_s
        while True:
            await asyncio.sleep(min(1.0, self.settings.hang_s / 4))
            now = time.monotonic()
            for entry in self.entries:
                busy = entry.under_way and not any(server.syncing for server in entry.servers)
                if busy and now - entry.heard > self.settings.hang_s:
                    self.examine(entry)
            if self.up() or self.keeper:  # ours have start_timeout_s
                self.none_since = now
            elif now - self.none_since > limit:
                message = (
                    f"rollout.request_timeout_s = {limit:g}: no server could be used for so long: {self.reasons()}"
                )
                self.background.fail(RunError(message))

    def reasons(self) -> str:
        return "; ".join(f"{server.url} {server.why}" for server in self.servers)

    def _entry(self, server: Server) -> Entry:
        return next(entry for entry in self.entries if server in entry.servers)

    def _say(self, message: str) -> None:
        print(message, file=sys.stderr, flush=True)


async def quietly(api: Api, path: str, body: dict[str, Any] | None = None) -> None:
    """Ask for something that may fail."""
    with contextlib.suppress(ServerError):
        await api.post(path, body, timeout_s=5.0)
