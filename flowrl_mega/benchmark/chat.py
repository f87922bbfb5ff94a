"""Answers of servers that speak OpenAI's chat protocol, whatever stands behind them."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from typing import Any

from flowrl_mega.benchmark.answers import Answer
from flowrl_mega.benchmark.writer import Done, Stop, Work, seed_of
from flowrl_mega.config import ConfigError
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.rollout.chat import Ask, ChatAnswer, ChatServer, ask_all
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.server_client import Malformed
from flowrl_mega.rollout.sglang.attached import ASK_S, read_key
from flowrl_mega.rollout.sglang.engine import allow_connections

STOP_S = 1.0  # between looks at whether the job is to stop


class ChatWriter:
    """Servers of OpenAI's chat protocol, all with the same model. They make the prompts themselves. On one rank."""

    def __init__(self, config: EvalConfig) -> None:
        self.rollout, self.seed = config.rollout, config.seed
        assert isinstance(config.rollout.servers, list), "the settings' check has seen to it"
        self.loop, key = LoopThread(), read_key(config.rollout.of_servers())
        allow_connections(config.rollout.concurrency)
        self.servers = [ChatServer(url, key) for url in config.rollout.servers]
        try:
            self.model = self.loop.call(model_of(self.servers, config.model.name))
        except BaseException:
            self.close()
            raise

    def write(self, work: Work, done: Done, stop: Stop) -> bool:
        rollout, places = self.rollout, work.places
        asks = [
            Ask(work.prompts[place.problem], self.model, rollout.max_tokens, rollout.temperature, rollout.top_p, seed)
            for place in places
            for seed in [seed_of(self.seed, *place) >> 1]
        ]

        def on_answer(i: int, answer: ChatAnswer) -> None:
            done(places[i], Answer(answer.text, answer.tokens, answer.finish))

        under_way, timeout_s = rollout.concurrency, rollout.request_timeout_s
        work_to_do = ask_all(self.servers, asks, on_answer, under_way=under_way, timeout_s=timeout_s)
        return self.loop.call(_unless(stop, work_to_do))

    def close(self) -> None:
        for server in self.servers:
            self.loop.call(server.close())
        self.loop.close()


async def model_of(servers: Sequence[ChatServer], name: str | None, setting: str = "model.name") -> str:
    """The model to ask for, which all servers have: the one of this name, or the first that they list."""
    for server in servers:
        try:
            names = await server.models(ASK_S)
        except (ServerError, Malformed) as error:
            raise ConfigError(f"{error}; is the server up, and the URL right?") from None
        name = name or next(iter(names), None)
        if name not in names:
            raise ConfigError(
                f"{setting} = {name!r}: {server.url} serves {', '.join(names) or 'none'}; name one of them"
            )
    assert name, "there is a server"
    return name


async def _unless(stop: Stop, work: Coroutine[Any, Any, None]) -> bool:
    """Wait for `work`, or until `stop`: whether it was done."""
    task = asyncio.ensure_future(work)
    while not task.done():
        await asyncio.wait([task], timeout=STOP_S)
        if stop() and not task.done():
            task.cancel()
            await asyncio.wait([task])
            return False
    task.result()
    return True
