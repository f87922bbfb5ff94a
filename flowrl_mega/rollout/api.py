"""HTTP to one server: pooled connections, deadlines, errors that name the server; and the thread that it runs in."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Coroutine
from typing import Any, TypeVar

import aiohttp

T = TypeVar("T")


class ServerError(Exception):
    """A server did not do what it was asked to. `status` 0: it gave no answer (refused, reset, timed out)."""

    def __init__(self, url: str, message: str, status: int = 0) -> None:
        super().__init__(f"{url}: {message}")
        self.url, self.message, self.status = url, message, status

    @property
    def is_refusal(self) -> bool:
        """The request itself is wrong: asking again, or another server, gives the same."""
        return 400 <= self.status < 500 and self.status not in (408, 429)


class Api:
    """One server. All methods are coroutines of the one loop in which it was first used."""

    def __init__(self, url: str, api_key: str | None = None, connections: int = 0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connections = connections  # 0: no limit
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, timeout_s: float = 30.0) -> Any:
        return await self._ask("GET", path, None, timeout_s)

    async def post(self, path: str, body: dict[str, Any] | None = None, timeout_s: float = 30.0) -> Any:
        return await self._ask("POST", path, body or {}, timeout_s)

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def _ask(self, method: str, path: str, body: dict[str, Any] | None, timeout_s: float) -> Any:
        """The answer as JSON (None where it is empty); ServerError for anything but a 2xx with such a body."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections)
            # An ever longer read buffer is the price of large answers otherwise; 1 MiB keeps the loop free.
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, read_bufsize=1 << 20, trust_env=False
            )
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            async with self._session.request(method, self.url + path, json=body, timeout=timeout) as answer:
                text = await answer.read()
                if answer.status // 100 != 2:
                    raise ServerError(self.url, f"{method} {path}: {answer.status}, {_message(text)}", answer.status)
                return await answer.json(content_type=None) if text.strip() else None
        except TimeoutError:
            raise ServerError(self.url, f"{method} {path}: no answer in {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(self.url, f"{method} {path}: {error or type(error).__name__}") from None
        except ValueError as error:  # not JSON
            raise ServerError(self.url, f"{method} {path}: answered with something else than JSON ({error})") from None


def _message(text: bytes) -> str:
    """What an error's body says, in a line: SGLang has {"error": {"message": ...}}, {"message": ...} and plain text."""
    said: Any = text.decode(errors="replace").strip()
    with contextlib.suppress(ValueError):
        said = json.loads(said)
    for key in ("error", "message", "detail"):
        said = said.get(key, said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:500] or "no message"


class LoopThread:
    """An event loop in a thread of its own: requests go on while the caller trains."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="rollout", daemon=True)
        self._thread.start()

    def call(self, coroutine: Coroutine[Any, Any, T], timeout_s: float | None = None) -> T:
        """Run it there and wait for its result."""
        return asyncio.run_coroutine_threadsafe(coroutine, self.loop).result(timeout_s)

    def close(self) -> None:
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()
