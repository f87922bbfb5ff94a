"""Chat completions of any OpenAI-compatible server: one request, and many at once with retries."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from math import inf
from typing import Any, Literal
from urllib.parse import urlsplit

from flowrl_mega.rollout.http_client import HttpClient, ServerError
from flowrl_mega.rollout.server_client import Malformed
from flowrl_mega.settings import ConfigError, RunError

Message = Mapping[str, str]  # {"role": ..., "content": ...}
FIRST_PAUSE_S, LAST_PAUSE_S = 0.5, 30.0
TRIES = 8  # the pauses between them make about a minute
GO_ON = "look at the server's log, then run this again"
REFUSED = {
    401: "; give the server's API key",
    403: "; give an API key that may use this model",
    404: "; give the URL of an OpenAI API (http://host:30000/v1) and the name of a model that it serves",
}


@dataclass(frozen=True)
class ChatAnswer:
    text: str
    tokens: int | None  # None where the server does not tell
    finish: Literal["stop", "length"]


@dataclass(frozen=True)
class Ask:
    """One request."""

    messages: Sequence[Message]
    model: str
    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None  # None: the server draws one


class ChatServer(HttpClient):
    """One server. The URL is that of its OpenAI API, http://host:30000/v1; /v1 is added to a URL without any path."""

    def __init__(self, url: str, api_key: str | None = None, connections: int = 0) -> None:
        bare = not urlsplit(url).path.strip("/")
        super().__init__(url.rstrip("/") + ("/v1" if bare else ""), api_key, connections)

    async def models(self, timeout_s: float) -> list[str]:
        """The names of the models that it serves. Raises ServerError and Malformed."""
        said = await self.get("/models", timeout_s)
        try:
            names = [model["id"] for model in said["data"]]
        except (KeyError, TypeError):
            names = [None]
        if not all(isinstance(name, str) for name in names):
            raise Malformed(f'{self.url}/models answered {_short(said)}: not {{"data": [{{"id": NAME}}]}}')
        return names

    async def chat(
        self,
        messages: Sequence[Message],
        *,
        model: str,
        max_tokens: int,
        temperature: float,
        top_p: float,
        seed: int | None,
        timeout_s: float,
    ) -> ChatAnswer:
        """One answer. Raises ServerError and Malformed."""
        body: dict[str, Any] = {
            "model": model,
            "messages": [dict(message) for message in messages],
            "max_tokens": max_tokens,
            "temperature": temperature,
            "top_p": top_p,
        }
        if seed is not None:
            body["seed"] = seed
        said = await self.post("/chat/completions", body, timeout_s)
        try:
            return read_answer(said)
        except Malformed as error:
            raise Malformed(f"{self.url}/chat/completions: {error}") from None


def read_answer(said: Any) -> ChatAnswer:
    """The answer in a response's body, whose thoughts, where the server parted them off, are put back in <think> tags.

    The end tag is left out where the answer was cut off while it thought, as the model left it out. Raises Malformed.
    """
    choices = said.get("choices") if isinstance(said, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed(f"one choice was asked for, and the answer is {_short(said)}")
    finish, message = choices[0].get("finish_reason"), choices[0].get("message")
    if finish not in ("stop", "length"):
        raise Malformed(f'finish_reason = {_short(finish)}: an answer ends by "stop" or "length"')
    message = message if isinstance(message, dict) else {}
    content, thoughts = message.get("content"), message.get("reasoning_content") or message.get("reasoning") or ""
    if not isinstance(thoughts, str) or not (isinstance(content, str) or content is None and thoughts):
        raise Malformed(f"the message is {_short(choices[0].get('message'))}: its content is no text")
    text = content or ""
    if thoughts:
        cut_off = finish == "length" and not text
        text = f"<think>{thoughts}" + ("" if cut_off else f"</think>{text}")
    usage = said.get("usage")
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    return ChatAnswer(text, tokens if isinstance(tokens, int) else None, finish)


@dataclass
class _Line:
    """One server, and how often it has failed since it last answered. Requests that fail together count once."""

    server: ChatServer
    failed: int = 0
    failed_at: float = -inf  # the last failure that counted: what was asked before it and fails is part of it
    said: str = ""
    failures: Counter[int] = field(default_factory=Counter)  # of each request, ever

    def fail(self, index: int, begun: float, error: Exception) -> None:
        self.failures[index] += 1
        self.said = str(error)
        if begun >= self.failed_at:
            self.failed += 1
            self.failed_at = asyncio.get_running_loop().time()


async def ask_all(
    servers: Sequence[ChatServer],
    asks: Sequence[Ask],
    on_answer: Callable[[int, ChatAnswer], None],
    *,
    under_way: int,
    timeout_s: float,
    tries: int = TRIES,
) -> None:
    """Ask everything, in order, with up to `under_way` requests at once on each server: whoever is free takes the next.

    `on_answer(index, answer)` is called as each answer comes. A request that fails rests, longer each time, and is then
    asked again by whichever server is free. A server that failed `tries` times in a row is given up. Raises RunError
    once none is left, or one request has failed that often on a server that answers others; ConfigError as soon as a
    server refuses a request (4xx); whatever on_answer raises. What is still under way is then cancelled.
    """
    lines = [_Line(server) for server in servers]
    left: asyncio.Queue[int] = asyncio.Queue()
    for index in range(len(asks)):
        left.put_nowait(index)
    unanswered, all_answered = set(range(len(asks))), asyncio.Event()

    async def connection(line: _Line) -> None:
        while True:
            index = await left.get()
            if line.failed >= tries:
                left.put_nowait(index)
                return
            begun = asyncio.get_running_loop().time()
            try:
                answer = await _ask(line.server, asks[index], timeout_s)
            except (ServerError, Malformed) as error:
                line.fail(index, begun, error)
                if all(each.failed >= tries for each in lines):
                    told = "\n".join(each.said for each in lines)
                    raise RunError(f"{told}\nno answer in {tries} tries; {GO_ON}") from None
                if line.failures[index] >= tries > line.failed:
                    raise RunError(f"{error} (request {index}, {tries} times); {GO_ON}") from None
                await asyncio.sleep(_pause(max(line.failed, line.failures[index])))
                left.put_nowait(index)
            else:
                line.failed = 0
                on_answer(index, answer)
                unanswered.remove(index)
                if not unanswered:
                    all_answered.set()

    if not asks:
        return
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(connection(line)) for line in lines for _ in range(min(under_way, len(asks)))]
            await all_answered.wait()
            for task in tasks:
                task.cancel()
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None


async def _ask(server: ChatServer, ask: Ask, timeout_s: float) -> ChatAnswer:
    try:
        return await server.chat(
            ask.messages,
            model=ask.model,
            max_tokens=ask.max_tokens,
            temperature=ask.temperature,
            top_p=ask.top_p,
            seed=ask.seed,
            timeout_s=timeout_s,
        )
    except ServerError as error:
        if error.is_refusal:
            raise ConfigError(f"{error}{REFUSED.get(error.status, '')}") from None
        raise


def _pause(failures: int) -> float:
    """Seconds before the next try: twice as many each time, drawn so that connections do not all come back at once."""
    return min(LAST_PAUSE_S, FIRST_PAUSE_S * 2 ** (failures - 1)) * random.uniform(0.5, 1.0)


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} ..."
