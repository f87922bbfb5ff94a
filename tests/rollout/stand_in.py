"""A server that speaks SGLang's HTTP without a model, in a thread of the test process, with faults on demand.

What it answers is compared with recordings of the real one (test_stand_in.py), and those with the real one again
(tests/integration/test_sglang_engine.py). Answers follow from prompt and seed alone, so a test knows them.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import random
import time
from collections import Counter, deque
from collections.abc import Callable
from typing import Any

import aiohttp
from aiohttp import web

from flowrl_mega.parallel.launch import reserve_port
from flowrl_mega.rollout.loop_thread import LoopThread

Json = dict[str, Any]
SAMPLING = (
    "max_new_tokens", "temperature", "top_p", "top_k", "stop_token_ids", "ignore_eos", "skip_special_tokens",
    "sampling_seed", "no_stop_trim",
)  # fmt: skip
INVALID = {"object": "error", "message": 20 * "invalid ", "type": "Bad Request", "param": None, "code": 400}
OPEN = "a weight-update session is"


def answer_tokens(prompt: list[int], sampling: Json, vocab: int) -> tuple[list[int], list[float]]:
    """The tokens and log-probs that a stand-in answers with."""
    drawn = random.Random(hashlib.sha256(repr((prompt, sampling.get("sampling_seed"))).encode()).digest())
    tokens: list[int] = []
    stops = () if sampling.get("ignore_eos") else sampling.get("stop_token_ids") or ()
    while len(tokens) < sampling["max_new_tokens"] and not (tokens and tokens[-1] in stops):
        tokens.append(drawn.randrange(vocab))
    return tokens, [-drawn.random() for _ in tokens]


class StandIn:
    """One server. `faults` are what the next answers of /generate meet, in order:
    ("status", N), ("reset", None), ("truncated", None), ("never", None), ("edit", function of the list of answers that
    gives another one), ("die", seconds until it is there again, with the weights of its start; or None).
    """

    def __init__(
        self,
        vocab: int = 101,
        context: int = 128,
        key: str | None = None,
        model_path: str = "elsewhere",
        model_type: str = "llama",
        hidden: int = 32,
        layers: int = 2,
        token_s: float = 0.0,
    ) -> None:
        self.vocab, self.context, self.key, self.token_s = vocab, context, key, token_s
        self.started_with = model_path
        self.model_path, self.model_type, self.hidden, self.layers = model_path, model_type, hidden, layers
        self.reserved = reserve_port()  # so that nobody takes it between `die` and `restart`
        self.port = self.reserved.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.faults: deque[tuple[str, Any]] = deque()
        self.seen: list[tuple[str, Any]] = []  # (path, body) of every request
        self.workers: list[str] | None = None  # of a router
        self.under_way = Counter[str]()
        self.most_at_once = 0
        self.lags_s = 0.0  # for how long after an answer a last decoding step is in progress
        self.idle_at = 0.0
        self.hold_at: int | None = None  # the token before which every answer waits, while this is set
        self.held = 0  # answers that have come so far
        self.thread = LoopThread()
        self._forget()
        self.start()

    def _forget(self) -> None:
        """As a server that has just been started."""
        self.version, self.paused, self.session, self.hangs = "default", False, False, False
        self.given: list[tuple[str, str]] = []  # ("tensor" | "distributed" | "disk", version) of updates
        self.memory = {"kv_cache", "weights"}

    # Its life

    def start(self) -> None:
        self.thread.call(self._start())

    def die(self) -> None:
        """As when its process is killed: connections break, the port is free."""
        self.thread.call(self._die())

    def restart(self) -> None:
        """Start again after `die`: with the weights it had at first."""
        self._forget()
        self.start()

    def hang(self, hangs: bool = True) -> None:
        """Connections are taken, and nothing is ever answered (as after SIGSTOP)."""
        self.hangs = hangs

    def close(self) -> None:
        self.thread.call(self._die())
        self.thread.close()
        self.reserved.close()

    async def _start(self) -> None:
        app = web.Application(client_max_size=1 << 30)
        app.router.add_route("*", "/{path:.*}", self._route)
        self.runner = web.AppRunner(app, shutdown_timeout=0.0, handler_cancellation=True)
        await self.runner.setup()
        await web.TCPSite(self.runner, "127.0.0.1", self.port, reuse_address=True).start()

    async def _die(self) -> None:
        server = self.runner.server
        for connection in list(server.connections) if server else []:
            if connection.transport:
                connection.transport.abort()
        await self.runner.cleanup()

    async def _die_and_return(self, seconds: float | None) -> None:
        await self._die()
        if seconds is not None:
            self._forget()
            await asyncio.sleep(seconds)
            await self._start()

    # Requests

    async def _route(self, request: web.Request) -> web.StreamResponse:
        body = await request.json() if request.can_read_body else None
        self.seen.append((request.path, body))
        while self.hangs:
            await asyncio.sleep(0.01)
        if self.key and request.headers.get("Authorization") != f"Bearer {self.key}" and request.path != "/health":
            return web.json_response({"error": "Unauthorized"}, status=401)
        name = request.path.strip("/").replace("/", "_")
        handler = getattr(self, f"do_{name}", None)
        if handler is None or (self.workers is not None and name not in ("generate", "workers", "health")):
            return web.json_response({"detail": "Not Found"}, status=404)
        try:
            return await handler(body or {})
        except ConnectionResetError:
            assert request.transport
            request.transport.abort()
            return web.Response()

    def asked(self, path: str) -> list[Any]:
        """The bodies of the requests for this path."""
        return [body for seen, body in self.seen if seen == path]

    # What SGLang has, by path

    async def do_health(self, body: Json) -> web.Response:
        return web.Response()

    async def do_model_info(self, body: Json) -> web.Response:
        return web.json_response(
            {
                "model_path": self.model_path,
                "weight_version": self.version,
                "model_type": self.model_type,
                "architectures": ["LlamaForCausalLM"],
                "is_generation": True,
            }
        )

    async def do_server_info(self, body: Json) -> web.Response:
        return web.json_response(
            {
                "version": "0.5.23",
                "model_path": self.started_with,
                "device": "cpu",
                "dtype": "float32",
                "tp_size": 1,
                "max_req_input_len": self.context - 6,
                "max_total_num_tokens": 8192,
                "enable_deterministic_inference": False,
            }
        )

    async def do_v1_models(self, body: Json) -> web.Response:
        card = {
            "id": self.model_path, "object": "model", "created": 0, "owned_by": "sglang", "root": self.model_path,
            "parent": None, "max_model_len": self.context,
        }  # fmt: skip
        return web.json_response({"object": "list", "data": [card]})

    async def do_workers(self, body: Json) -> web.Response:
        if self.workers is None:
            return web.json_response({"detail": "Not Found"}, status=404)
        return web.json_response({"workers": [{"url": url} for url in self.workers], "total": len(self.workers)})

    async def do_get_weights_by_name(self, body: Json) -> web.Response:
        name = body["name"]
        if name == "model.embed_tokens.weight":
            return web.json_response([[0.5] * self.hidden])
        if name.startswith("model.layers.") and int(name.split(".")[2]) < self.layers:
            return web.json_response([0.5])
        return web.json_response({"error": {"message": "Get parameter by name failed"}}, status=400)

    async def do_generate(self, body: Json) -> web.StreamResponse:
        kind, what = self.faults.popleft() if self.faults else ("", None)
        self.under_way["generate"] += 1
        self.most_at_once = max(self.most_at_once, self.under_way["generate"])
        try:
            if kind == "status":
                return web.json_response({"error": {"message": "as it was told to"}}, status=what)
            if kind == "reset":
                raise ConnectionResetError
            if kind == "never":
                await asyncio.Event().wait()
            if kind == "die":
                self.dying = asyncio.ensure_future(self._die_and_return(what))
                await asyncio.Event().wait()
            if self.workers:
                return await self._pass_on(body)
            return await self._generate(body, what if kind == "edit" else None, truncated=kind == "truncated")
        finally:
            self.under_way["generate"] -= 1
            self.idle_at = time.monotonic() + self.lags_s

    async def _pass_on(self, body: Json) -> web.Response:
        """As a router does; it takes one prompt a request."""
        assert self.workers
        if isinstance(body["sampling_params"], list):
            return web.Response(text="Failed to deserialize the JSON body into the target type", status=422)
        self.workers.append(self.workers.pop(0))
        async with (
            aiohttp.ClientSession() as session,
            session.post(self.workers[0] + "/generate", json=body) as answer,
        ):
            return web.Response(body=await answer.read(), status=answer.status, content_type="application/json")

    async def _generate(self, body: Json, edit: Callable[[list[Json]], Any] | None, truncated: bool) -> web.Response:
        prompts, sampling = body["input_ids"], body["sampling_params"]
        single = not isinstance(prompts[0], list)
        pairs = [(prompts, sampling)] if single else list(zip(prompts, sampling, strict=True))
        for ids, params in pairs:
            if fault := self._refusal(ids, params):
                return fault
        answers: Any = await asyncio.gather(*(self._answer(*pair) for pair in pairs))
        answers = edit(answers) if edit else answers
        text = json.dumps(answers[0] if single and isinstance(answers, list) else answers)
        return web.Response(text=text[: len(text) // 2] if truncated else text, content_type="application/json")

    def _refusal(self, ids: list[int], params: Json) -> web.Response | None:
        for name in params:
            if name not in SAMPLING:
                return web.json_response({"error": f"unknown field `{name}`, expected one of ..."}, status=400)
        if not all(isinstance(token, int) for token in ids):
            return web.json_response(INVALID, status=400)
        assert ids and all(0 <= token < self.vocab for token in ids), "this kills the real server"
        total = len(ids) + params["max_new_tokens"]
        if total > self.context:
            limit = f"Requested token count exceeds the model's maximum context length of {self.context} tokens."
            return web.json_response({"error": {"message": f"{limit} You requested a total of {total}"}}, status=400)
        return None

    async def _answer(self, prompt: list[int], params: Json) -> Json:
        """Token by token, with the version of the weights that each is made by."""
        tokens, logp = answer_tokens(prompt, params, self.vocab)
        spans: list[Json] = []
        for place in range(len(tokens)):
            if self.token_s:
                await asyncio.sleep(self.token_s)
            self.held += place == self.hold_at
            while self.paused or place == self.hold_at:
                await asyncio.sleep(0.002)
            if not spans or spans[-1]["version"] != self.version:
                spans.append({"version": self.version, "start": place, "end": place})
            spans[-1]["end"] = place + 1
        stops = params.get("stop_token_ids") or ()
        stopped = tokens[-1] in stops and not params.get("ignore_eos")
        reason = {"type": "stop", "matched": tokens[-1]} if stopped else {"type": "length", "length": len(tokens)}
        meta = {
            "id": "a", "finish_reason": reason, "prompt_tokens": len(prompt), "weight_version": self.version,
            "num_retractions": 0, "input_token_logprobs": [],
            "output_token_logprobs": [[x, token, None] for x, token in zip(logp, tokens, strict=True)],
            "output_token_logprobs_length": len(tokens), "reasoning_tokens": 0, "completion_tokens": len(tokens),
            "cached_tokens": 0, "weight_versions": spans, "cached_tokens_details": None, "dp_rank": None,
            "e2e_latency": 0.1, "response_sent_to_client_ts": 0.1,
        }  # fmt: skip
        return {"text": "", "output_ids": tokens, "meta_info": meta}

    async def do_abort_request(self, body: Json) -> web.Response:
        return web.Response()

    async def do_pause_generation(self, body: Json) -> web.Response:
        self.paused = True
        return web.json_response({"message": "Generation paused successfully.", "status": "ok"})

    async def do_continue_generation(self, body: Json) -> web.Response:
        self.paused = False
        return web.json_response({"message": "Generation continued successfully.", "status": "ok"})

    async def do_begin_weight_update(self, body: Json) -> web.Response:
        if self.session:
            return self._result(False, f"{OPEN} already open; call end_weight_update() first")
        self.session = True
        return self._result(True, "Success")

    async def do_end_weight_update(self, body: Json) -> web.Response:
        if not self.session:
            return self._result(False, "no weight-update session is open; call begin_weight_update() first")
        self.session = False
        return self._result(True, "Success")

    async def do_update_weights_from_tensor(self, body: Json) -> web.Response:
        return self._update("tensor", body)

    async def do_update_weights_from_distributed(self, body: Json) -> web.Response:
        return self._update("distributed", body)

    async def do_update_weights_from_disk(self, body: Json) -> web.Response:
        self.given.append(("disk", body["model_path"]))
        self.model_path = body["model_path"]  # in /model_info and /v1/models, but not in /server_info
        self.version = body.get("weight_version") or self.version
        return web.json_response({"success": True, "message": "Success", "num_paused_requests": 0})

    def _update(self, kind: str, body: Json) -> web.Response:
        if not self.session:
            between = "begin_weight_update() and end_weight_update()"
            return self._result(False, f"update_weights_from_{kind} must run between {between}")
        version = body.get("weight_version")
        self.given.append((kind, str(version)))
        self.version = version or self.version
        return self._result(True, "Success")

    def _result(self, success: bool, message: str) -> web.Response:
        return web.json_response({"success": success, "message": message}, status=200 if success else 400)

    async def do_flush_cache(self, body: Json) -> web.Response:
        """The caller's query says how long to wait; here it is as long as it takes."""
        await asyncio.sleep(max(0.0, self.idle_at - time.monotonic()))
        return web.Response(text="Cache flushed.")

    async def do_release_memory_occupation(self, body: Json) -> web.Response:
        if time.monotonic() < self.idle_at:  # the real one's scheduler asserts that it is idle
            await self._die()
        self.memory -= set(body["tags"])
        return web.json_response(None)

    async def do_resume_memory_occupation(self, body: Json) -> web.Response:
        tags = set(body["tags"])
        assert not tags & self.memory, "this kills the real server"
        self.memory |= tags
        return web.json_response(None)
