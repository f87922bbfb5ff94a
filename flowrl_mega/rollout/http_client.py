"""JSON over HTTP to one server: pooled connections, deadlines, and errors that name the server."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import aiohttp


class ServerError(Exception):
    """A request failed. `status` is the HTTP status; 0 means no answer (connection refused, reset or timed out)."""

    def __init__(self, url: str, message: str, status: int = 0) -> None:
        super().__init__(f"{url}: {message}")
        self.url, self.message, self.status = url, message, status

    @property
    def is_refusal(self) -> bool:
        """Whether the request itself is wrong, so that neither a retry nor another server helps."""
        return 400 <= self.status < 500 and self.status not in (408, 429)


class HttpClient:
    """Client of one server. All methods are coroutines of the event loop in which the first one ran."""

    def __init__(self, url: str, api_key: str | None = None, connections: int = 0) -> None:
        self.url = url.rstrip("/")
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
        self._connections = connections  # 0: no limit
        self._session: aiohttp.ClientSession | None = None

    async def get(self, path: str, timeout_s: float) -> Any:
        return await self._request("GET", path, None, timeout_s)

    async def post(
        self,
        path: str,
        body: dict[str, Any],
        timeout_s: float,
        query: dict[str, float] | None = None,
        is_json: bool = True,
    ) -> Any:
        """`is_json`: of the response; what is not is not read."""
        return await self._request("POST", path, body, timeout_s, query, is_json)

    async def close(self) -> None:
        if self._session:
            await self._session.close()
            self._session = None

    async def _request(
        self,
        method: str,
        path: str,
        body: dict[str, Any] | None,
        timeout_s: float,
        query: dict[str, float] | None = None,
        is_json: bool = True,
    ) -> Any:
        """The response body as JSON; None if it is empty, or none. ServerError unless the status is 2xx and the body
        valid."""
        if self._session is None:
            connector = aiohttp.TCPConnector(limit=self._connections)
            # An ever longer read buffer is the price of large answers otherwise; 1 MiB keeps the loop free.
            self._session = aiohttp.ClientSession(
                connector=connector, headers=self._headers, read_bufsize=1 << 20, trust_env=False
            )
        try:
            timeout = aiohttp.ClientTimeout(total=timeout_s)
            asked = self._session.request(method, self.url + path, json=body, params=query, timeout=timeout)
            async with asked as answer:
                text = await answer.read()
                if answer.status // 100 != 2:
                    raise ServerError(self.url, f"{method} {path}: {answer.status}, {_message(text)}", answer.status)
                return await answer.json(content_type=None) if is_json and text.strip() else None
        except TimeoutError:
            raise ServerError(self.url, f"{method} {path}: no answer in {timeout_s:g} s") from None
        except aiohttp.ClientError as error:
            raise ServerError(self.url, f"{method} {path}: {error or type(error).__name__}") from None
        except ValueError as error:  # not JSON
            raise ServerError(self.url, f"{method} {path}: answered with something else than JSON ({error})") from None


def _message(text: bytes) -> str:
    """The message in an error's body, in one line: {"error": {"message": ...}}, {"message": ...} or plain text."""
    said: Any = text.decode(errors="replace").strip()
    with contextlib.suppress(ValueError):
        said = json.loads(said)
    for key in ("error", "message", "detail"):
        said = said.get(key, said) if isinstance(said, dict) else said
    return " ".join(str(said).split())[:500] or "no message"
