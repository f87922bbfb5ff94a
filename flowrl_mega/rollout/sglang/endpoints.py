"""SGLang's HTTP endpoints: one coroutine each, called as SGLang calls the endpoint. No path stands anywhere else.

Tested with SGLang 0.5.23. All raise ServerError, after `timeout_s` seconds at the latest.
"""

from __future__ import annotations

import asyncio
import http.client
from typing import Any
from urllib.parse import urlsplit

from flowrl_mega.model.generation import Sampling
from flowrl_mega.rollout.engine import Request, Rollout
from flowrl_mega.rollout.http_client import HttpClient
from flowrl_mega.rollout.sglang.answers import read_answers, request_body

MODEL_INFO = "/model_info"
ANSWERS_S = 2.0  # between what a server is asked to wait for and our own patience


class SglangServer(HttpClient):
    """One server: the ServerClient of dispatch and health, and what the weight sync asks for."""

    # Generation

    async def generate(self, request: Request, sampling: Sampling, seeds: list[int], timeout_s: float) -> Any:
        """One dict per answer: `output_ids` and `meta_info`."""
        return await self._generate(request_body(request, sampling, seeds), timeout_s)

    def read_answers(self, response: Any, request: Request, vocab: int, versions: range | None) -> list[Rollout]:
        return read_answers(response, request, vocab, versions)

    async def abort_request(self, timeout_s: float) -> None:
        """Abort all requests."""
        await self.post("/abort_request", {"abort_all": True}, timeout_s)

    async def pause_generation(self, mode: str, timeout_s: float) -> None:
        """`mode`: in_place keeps the KV cache of running requests, retract computes it again, abort ends them."""
        await self.post("/pause_generation", {"mode": mode}, timeout_s)

    async def continue_generation(self, timeout_s: float) -> None:
        await self.post("/continue_generation", {}, timeout_s)

    # What the server says of itself

    async def health(self, timeout_s: float) -> None:
        await self.get("/health", timeout_s)

    async def model_info(self, timeout_s: float) -> Any:
        """Among others `weight_version`, and `model_path` as of the last update from disk."""
        return await self.get(MODEL_INFO, timeout_s)

    async def server_info(self, timeout_s: float) -> Any:
        """The server's arguments and `version`."""
        return await self.get("/server_info", timeout_s)

    async def models(self, timeout_s: float) -> Any:
        """OpenAI's list of models; SGLang adds `max_model_len`."""
        return await self.get("/v1/models", timeout_s)

    async def get_weights_by_name(self, name: str, truncate_size: int, timeout_s: float) -> Any:
        """The first `truncate_size` rows of a tensor, as nested lists."""
        return await self.post("/get_weights_by_name", {"name": name, "truncate_size": truncate_size}, timeout_s)

    async def weights_checker(self, action: str, timeout_s: float) -> Any:
        """Action checksum: `ranks`, each with its `parallelism_info` and the `checksums` of its tensors by name."""
        return await self.post("/weights_checker", {"action": action}, timeout_s)

    # Memory

    async def flush_cache(self, timeout_s: float) -> None:
        wait_s = max(0.0, timeout_s - ANSWERS_S)  # the server says in time that it was not idle
        await self.post("/flush_cache", {}, timeout_s, query={"timeout": wait_s}, is_json=False)

    async def release_memory_occupation(self, tags: list[str], timeout_s: float) -> None:
        await self.post("/release_memory_occupation", {"tags": tags}, timeout_s)

    async def resume_memory_occupation(self, tags: list[str], timeout_s: float) -> None:
        await self.post("/resume_memory_occupation", {"tags": tags}, timeout_s)

    # Weight updates; `body`: the fields that all three kinds share (flush_cache, weight_version) and the kind's own

    async def begin_weight_update(self, timeout_s: float) -> None:
        """Open the session in which updates from tensor and distributed come."""
        await self.post("/begin_weight_update", {}, timeout_s)

    async def end_weight_update(self, timeout_s: float) -> None:
        await self.post("/end_weight_update", {}, timeout_s)

    async def update_weights_from_disk(self, body: dict[str, Any], timeout_s: float) -> None:
        await self.post("/update_weights_from_disk", body, timeout_s)

    async def update_weights_from_tensor(self, body: dict[str, Any], timeout_s: float) -> None:
        await self.post("/update_weights_from_tensor", body, timeout_s)

    async def update_weights_from_distributed(self, body: dict[str, Any], timeout_s: float) -> None:
        await self.post("/update_weights_from_distributed", body, timeout_s)

    async def init_weights_update_group(self, body: dict[str, Any], timeout_s: float) -> None:
        """Join a process group as ranks `rank_offset`, `rank_offset` + 1, ..."""
        await self.post("/init_weights_update_group", body, timeout_s)

    async def destroy_weights_update_group(self, group_name: str, timeout_s: float) -> None:
        await self.post("/destroy_weights_update_group", {"group_name": group_name}, timeout_s)

    async def _generate(self, body: dict[str, Any], timeout_s: float) -> Any:
        return await self.post("/generate", body, timeout_s)


class SglangRouter(SglangServer):
    """sglang-router in front of several servers."""

    async def workers(self, timeout_s: float) -> Any:
        """The servers behind it; a server has no such endpoint."""
        return await self.get("/workers", timeout_s)

    async def generate(self, request: Request, sampling: Sampling, seeds: list[int], timeout_s: float) -> Any:
        """A router passes on one `sampling_params` per request: here every answer is a request of its own."""
        body = request_body(request, sampling, seeds)
        pairs = zip(body["input_ids"], body["sampling_params"], strict=True)
        bodies = [{**body, "input_ids": ids, "sampling_params": params} for ids, params in pairs]
        posts = [asyncio.ensure_future(self._generate(one, timeout_s)) for one in bodies]
        try:
            return await asyncio.gather(*posts)
        finally:
            for post in posts:
                post.cancel()


def is_up(url: str) -> bool:
    """Whether a server answers one request within 5 s, if only by asking for a key. Blocks: not for an event loop."""
    parts = urlsplit(url)
    connection = http.client.HTTPConnection(parts.hostname or "", parts.port, timeout=5)
    try:
        connection.request("GET", MODEL_INFO)
        return connection.getresponse().status in (200, 401)
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
