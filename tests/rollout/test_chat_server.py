"""Chat completions against a local server whose answers, faults and pace the test chooses."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from flowrl_mega.rollout import chat
from flowrl_mega.rollout.chat import Ask, ChatAnswer, ChatServer, ask_all
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.server_client import Malformed
from flowrl_mega.settings import ConfigError, RunError

Json = dict[str, Any]
USUAL = {"temperature": 0.6, "top_p": 0.95, "seed": 7, "timeout_s": 10.0}


def completion(text: str | None = "four", finish: Any = "stop", **message: Any) -> Json:
    """A body in the form of OpenAI's API reference."""
    return {
        "id": "chatcmpl-1",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "choices": [
            {"index": 0, "message": {"role": "assistant", "content": text, **message}, "finish_reason": finish}
        ],
        "usage": {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12},
    }


class Local:
    """A server that answers N to the request "N". The first requests meet `faults`: a status, or a body."""

    def __init__(self, *faults: Any, models: Any = None, slow_s: Callable[[int], float] = lambda index: 0.0) -> None:
        self.faults, self.models, self.slow_s = list(faults), models, slow_s
        self.asked: list[Json] = []
        self.keys: list[str | None] = []
        self.now = self.most = 0
        self.url = ""

    async def chat(self, request: web.Request) -> web.Response:
        body = await request.json()
        self.asked.append(body)
        self.keys.append(request.headers.get("Authorization"))
        self.now += 1
        self.most = max(self.most, self.now)
        try:
            await asyncio.sleep(self.slow_s(len(self.asked)))
        finally:
            self.now -= 1
        fault = self.faults.pop(0) if self.faults else None
        if isinstance(fault, int):
            return web.json_response({"error": {"message": f"fault {fault}"}}, status=fault)
        return web.json_response(completion(body["messages"][-1]["content"]) if fault is None else fault)

    async def list(self, request: web.Request) -> web.Response:
        return web.json_response(self.models)

    @property
    def order(self) -> list[int]:
        return [int(body["messages"][-1]["content"]) for body in self.asked]


def with_servers(use: Callable[..., Awaitable[Any]], *locals_: Local, path: str = "", key: str | None = None) -> Any:
    """What `use` gives, called with a client of each of the servers."""

    async def run() -> Any:
        async with AsyncExitStack() as stack:
            clients = []
            for local in locals_:
                app = web.Application()
                app.router.add_post("/v1/chat/completions", local.chat)
                app.router.add_get("/v1/models", local.list)
                server = await stack.enter_async_context(TestServer(app))
                clients.append(ChatServer(str(server.make_url(path)), key))
                local.url = clients[-1].url
                stack.push_async_callback(clients[-1].close)
            return await use(*clients)

    return asyncio.run(asyncio.wait_for(run(), 30))


def ask_one(local: Local, **more: Any) -> ChatAnswer:
    messages = [{"role": "user", "content": "2"}]
    return with_servers(lambda server: server.chat(messages, model="m", max_tokens=5, **{**USUAL, **more}), local)


def ask_many(count: int, *locals_: Local, **settings: Any) -> dict[int, str]:
    """The texts of the answers to requests 0, 1 and so on, in the order in which they came."""
    came: dict[int, str] = {}
    asks = [Ask([{"role": "user", "content": str(index)}], "m", 5) for index in range(count)]

    def keep(index: int, answer: ChatAnswer) -> None:
        assert index not in came, "answered twice"
        came[index] = answer.text

    def use(*servers: ChatServer) -> Awaitable[None]:
        return ask_all(
            servers, asks, settings.pop("on_answer", keep), **{"under_way": 2, "timeout_s": 10.0, **settings}
        )

    with_servers(use, *locals_)
    return came


@pytest.fixture
def pauses(monkeypatch):
    """No waiting: the pauses that would have been made, without the chance in them."""
    made, pause = [], chat._pause
    monkeypatch.setattr(chat.random, "uniform", lambda low, high: high)
    monkeypatch.setattr(chat, "_pause", lambda failures: made.append(pause(failures)) or 0.0)
    return made


@pytest.mark.parametrize("path", ["", "/", "/v1", "/v1/"])
def test_the_path_of_the_api_is_added_where_it_is_left_out(path):
    models = {"object": "list", "data": [{"id": "policy", "object": "model"}, {"id": "judge"}]}
    assert with_servers(lambda server: server.models(5.0), Local(models=models), path=path) == ["policy", "judge"]


def test_another_path_stays():
    assert ChatServer("https://host/api/v3/").url == "https://host/api/v3"


@pytest.mark.parametrize("models", [None, [], {"data": None}, {"data": [{"name": "x"}]}, {"data": [{"id": 3}]}, "yes"])
def test_models_that_are_no_list_are_shown(models):
    with pytest.raises(Malformed, match="/v1/models answered"):
        with_servers(lambda server: server.models(5.0), Local(models=models))


def test_the_request_says_what_was_asked_for():
    local = Local()
    messages = [{"role": "system", "content": "be short"}, {"role": "user", "content": "2"}]
    answer = with_servers(
        lambda server: server.chat(messages, model="m", max_tokens=5, **USUAL), local, key="sk-secret"
    )
    assert answer == ChatAnswer("2", 3, "stop")
    expected = {"model": "m", "messages": messages, "max_tokens": 5, "temperature": 0.6, "top_p": 0.95, "seed": 7}
    assert local.asked == [expected] and local.keys == ["Bearer sk-secret"]


def test_no_seed_is_sent_where_there_is_none():
    ask_one(local := Local(), seed=None)
    assert "seed" not in local.asked[0] and local.keys == [None]


THOUGHTS = "half of eight"


@pytest.mark.parametrize(
    "body, expected",
    [
        (completion("four", "length"), ChatAnswer("four", 3, "length")),
        (completion(""), ChatAnswer("", 3, "stop")),
        (completion("four", reasoning_content=None), ChatAnswer("four", 3, "stop")),
        (completion("4", reasoning_content=THOUGHTS), ChatAnswer(f"<think>{THOUGHTS}</think>4", 3, "stop")),
        (completion("4", reasoning=THOUGHTS), ChatAnswer(f"<think>{THOUGHTS}</think>4", 3, "stop")),
        (completion(None, "length", reasoning_content=THOUGHTS), ChatAnswer(f"<think>{THOUGHTS}", 3, "length")),
        (completion("4", "length", reasoning_content=THOUGHTS), ChatAnswer(f"<think>{THOUGHTS}</think>4", 3, "length")),
        (completion("", "stop", reasoning_content=THOUGHTS), ChatAnswer(f"<think>{THOUGHTS}</think>", 3, "stop")),
        ({**completion(), "usage": None}, ChatAnswer("four", None, "stop")),
        ({**completion(), "usage": {"completion_tokens": "3"}}, ChatAnswer("four", None, "stop")),
    ],
)
def test_answers(body, expected):
    assert ask_one(Local(body)) == expected


@pytest.mark.parametrize(
    "body, said",
    [
        ([], "one choice was asked for"),
        ({}, "one choice was asked for"),
        ({"choices": []}, "one choice was asked for"),
        ({"choices": [1]}, "one choice was asked for"),
        ({"choices": 2 * completion()["choices"]}, "one choice was asked for"),
        (completion(finish="abort"), "finish_reason = 'abort'"),
        (completion(finish=None), "finish_reason = None"),
        (completion(finish=["stop"]), r"finish_reason = \['stop'\]"),
        (completion(None), "content is no text"),
        (completion([{"type": "text", "text": "4"}]), "content is no text"),
        (completion("4", reasoning_content=3), "content is no text"),
        ({"choices": [{"message": "four", "finish_reason": "stop"}]}, "the message is 'four'"),
    ],
)
def test_a_malformed_body_is_told_with_the_url(body, said):
    with pytest.raises(Malformed, match=said) as caught:
        ask_one(local := Local(body))
    assert str(caught.value).startswith(f"{local.url}/chat/completions: ") and len(str(caught.value)) < 500


def test_one_failed_request_raises_the_servers_error():
    with pytest.raises(ServerError, match="503, fault 503"):
        ask_one(Local(503))


def test_all_are_asked_in_order_and_told_as_they_come():
    local = Local(slow_s=lambda nth: 0.2 if nth == 1 else 0.0)
    came = ask_many(5, local)
    assert local.order == [0, 1, 2, 3, 4]
    assert list(came) == [1, 2, 3, 4, 0], "the first answer is the slowest"
    assert came == {index: str(index) for index in range(5)}


@pytest.mark.parametrize("under_way, most", [(1, 1), (3, 3), (50, 8)])
def test_no_more_are_under_way_than_allowed(under_way, most):
    local = Local(slow_s=lambda nth: 0.02)
    ask_many(8, local, under_way=under_way)
    assert local.most == most


def test_nothing_to_ask():
    assert ask_many(0, Local()) == {}


@pytest.mark.parametrize("status", [408, 429, 500, 502, 503])
def test_a_failure_that_may_pass_is_tried_again(status, pauses):
    local = Local(status, status, status)
    assert ask_many(1, local, under_way=1) == {0: "0"}
    assert local.order == [0, 0, 0, 0] and pauses == [0.5, 1.0, 2.0]


def test_a_malformed_answer_is_asked_for_again(pauses):
    assert ask_many(2, Local(completion(finish="abort")), under_way=1) == {1: "1", 0: "0"}


def test_a_server_that_does_not_answer_in_time_is_asked_again(pauses):
    local = Local(slow_s=lambda nth: 1.0 if nth == 1 else 0.0)
    assert ask_many(1, local, timeout_s=0.3) == {0: "0"} and local.order == [0, 0]


def test_pauses_begin_anew_after_an_answer(pauses):
    local = Local(500, 500, None, 500)
    ask_many(4, local, under_way=1)
    assert local.order == [0, 1, 2, 3, 0, 1, 3] and pauses == [0.5, 1.0, 0.5]


def test_a_requests_own_pauses_grow_whatever_else_is_answered(pauses):
    local = Local(500, None, 500, None, 500)
    ask_many(3, local, under_way=1)
    assert local.order == [0, 1, 2, 0, 2, 2] and pauses == [0.5, 0.5, 1.0]


def test_what_fails_at_once_counts_once(pauses):
    """Four requests are cut off together: the server has failed once, and two such times are not four of its tries."""
    came = ask_many(4, Local(*[503] * 8, slow_s=lambda nth: 0.02), under_way=4, tries=4)
    assert len(came) == 4 and pauses == [0.5] * 4 + [1.0] * 4


def test_pauses_are_spread_so_that_connections_do_not_return_together():
    assert len({round(chat._pause(1), 6) for _ in range(20)}) > 10
    for failures, longest in ((1, 0.5), (2, 1.0), (6, 16.0), (7, 30.0), (20, 30.0)):
        assert all(longest / 2 <= chat._pause(failures) <= longest for _ in range(20))


def test_a_request_that_always_fails_ends_it_although_others_are_answered(pauses):
    local = Local(500, None, None, 500, 500, 500)
    with pytest.raises(RunError, match=r"500, fault 500 \(request 0, 4 times\); look at the server's log") as caught:
        ask_many(3, local, under_way=1, tries=4)
    assert str(caught.value).startswith(local.url) and local.order == [0, 1, 2, 0, 0, 0]


def test_a_server_that_is_gone_ends_it_after_few_tries_of_each_request(pauses):
    local = Local(*[503] * 100)
    with pytest.raises(RunError, match="fault 503\nno answer in 3 tries; look at"):
        ask_many(20, local, tries=3)
    assert 5 <= len(local.asked) <= 6, "two at once, three times"


def test_other_servers_do_the_work_of_one_that_is_gone(pauses):
    gone, works = Local(*[503] * 100), Local(slow_s=lambda nth: 0.01)
    came = ask_many(12, gone, works, tries=3)
    assert came == {index: str(index) for index in range(12)}
    assert sorted(set(works.order)) == list(range(12)) and len(gone.asked) <= 6


def test_a_request_is_taken_over_from_the_last_server_at_work(pauses):
    """The good server is free before the other gives up with a request in its hands."""
    gone, works = Local(*[503] * 100, slow_s=lambda nth: 0.05), Local()
    assert ask_many(3, gone, works, tries=2, under_way=1).keys() == {0, 1, 2}


def test_two_servers_share_the_requests():
    servers = [Local(slow_s=lambda nth: 0.02), Local(slow_s=lambda nth: 0.02)]
    ask_many(12, *servers)
    assert sorted(servers[0].order + servers[1].order) == list(range(12))
    assert all(4 <= len(server.asked) <= 8 for server in servers)


@pytest.mark.parametrize(
    "status, fix", [(400, ""), (401, "give the server's API key"), (404, "give the URL of an OpenAI")]
)
def test_a_refusal_ends_it_at_once(status, fix, pauses):
    local = Local(None, status)
    with pytest.raises(ConfigError, match=f"{status}, fault {status}.*{fix}") as caught:
        ask_many(50, local, under_way=1)
    assert str(caught.value).startswith(local.url) and local.order == [0, 1] and pauses == []


def test_what_was_answered_before_a_refusal_is_kept_and_the_rest_cancelled():
    came = []
    local = Local(None, None, 422, slow_s=lambda nth: 1.0 if nth > 3 else 0.0)
    with pytest.raises(ConfigError, match="fault 422"):
        ask_many(50, local, on_answer=lambda index, answer: came.append(index))
    assert sorted(came) == [0, 1]


def test_what_on_answer_raises_comes_out_as_it_is():
    def full(index, answer):
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        ask_many(3, Local(), on_answer=full)


def test_a_cut_connection_and_a_body_that_is_no_json_are_tried_again(pauses):
    class Rude(Local):
        async def chat(self, request):
            if len(self.asked) >= 2:
                return await super().chat(request)
            self.asked.append(await request.json())
            if len(self.asked) == 1:
                request.transport.close()
            return web.Response(text="<html>busy</html>")

    local = Rude()
    assert ask_many(1, local) == {0: "0"} and len(local.asked) == 3
    assert json.dumps(local.asked[0]) == json.dumps(local.asked[2])
