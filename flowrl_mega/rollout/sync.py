"""The policy's weights to the servers: paused, sent bucket by bucket, and what came of it checked."""

from __future__ import annotations

import asyncio
import contextlib
import sys
import time
from collections.abc import Coroutine
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from flowrl_mega.config import SyncSettings
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.policy import Policy
from flowrl_mega.model.weights import Buckets
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rollout.api import Api, LoopThread, ServerError
from flowrl_mega.rollout.broadcast import Broadcast
from flowrl_mega.rollout.checksums import DTYPES, Expected
from flowrl_mega.rollout.fp8 import to_fp8, with_quantization
from flowrl_mega.rollout.transfers import Deadline, Disk, Failures, Named, Server, SharedMemory, Transfer, Update, each

QUICK_S = 60.0  # for what a server that lives does at once
CLEAN_UP_S = 5.0  # for a server that has just failed


class WeightSync:
    """`push` is collective; only rank 0, which has the `loop`, talks to the servers.

    `side_files`: config.json, tokenizer and so on of the model, by name. `folder`: for transfer disk, where the
    settings name none.
    """

    def __init__(
        self,
        settings: SyncSettings,
        colocated: bool,
        layout: Layout,
        arch: Architecture,
        side_files: dict[str, bytes],
        folder: Path,
        loop: LoopThread | None,
    ) -> None:
        self.settings, self.layout, self.arch, self.loop = settings, layout, arch, loop
        self.metrics: dict[
            str, float
        ] = {}  # of the last push: perf/push_seconds, and perf/push_gb as sent to each server
        self.warned = False
        self.transfer: Transfer | None = None
        if loop:
            kind = settings.transfer or ("tensor" if colocated else "distributed")
            if kind == "disk":
                files = with_quantization(side_files) if settings.dtype == "fp8" else side_files
                self.transfer = Disk(Path(settings.folder) if settings.folder else folder, files)
            else:
                self.transfer = SharedMemory(layout.device) if kind == "tensor" else Broadcast(layout.device)

    def push(self, policy: Policy, servers: list[Api], version: int, check: bool) -> dict[str, str]:
        """Give every server the policy's weights under the name `version`. Collective.

        `servers` is read on rank 0 only. With `check`, all that they hold is compared. Rank 0 gets {url: what went
        wrong} of those that did not take the weights; these stay paused, and what they were answering is aborted,
        until a later push succeeds. Other ranks get {}, and replicas but the first have nothing to do.
        """
        if self.layout.dp_rank or self.layout.cp_rank:
            return {}
        start, failures = time.monotonic(), dict[str, str]()
        left = list(servers)
        while True:
            push = _Push(self, left, version) if self.loop and left else None
            self._round(policy, push, check)
            if push:
                failures |= push.failures
                left = [server.api for server in push.live] if push.transfer.broken else []
            if not self._from_first(bool(left)):
                break
        if push:
            self.metrics = {"perf/push_seconds": time.monotonic() - start, "perf/push_gb": push.bytes / 1e9}
        return failures

    def close(self) -> None:
        """End groups, and remove what was written."""
        if self.loop and self.transfer:
            self.loop.call(self.transfer.close())

    def warn(self, message: str) -> None:
        """Once; from the loop's thread."""
        if not self.warned:
            self.warned = True
            print(f"flowrl-mega: {message}", file=sys.stderr, flush=True)

    def _round(self, policy: Policy, push: _Push | None, check: bool) -> None:
        """All buckets once. The ranks gather them to the end, whatever becomes of the servers."""
        dtype = torch.bfloat16 if self.settings.dtype == "bf16" else None
        bucket_bytes = self.settings.bucket_mb << 20
        buckets = Buckets(policy, bucket_bytes, dtype)
        if push:
            push.begin(len(buckets), check)
        for bucket in buckets:
            if push and push.takes_more:
                push.send(to_fp8(bucket) if self.settings.dtype == "fp8" else bucket)
        if push:
            push.finish()

    def _from_first(self, value: bool) -> bool:
        """What rank 0 says, on all ranks of its replica."""
        if self.layout.replica_group.size() == 1:
            return value
        said = torch.tensor([value], dtype=torch.uint8, device=self.layout.device)
        dist.broadcast(said, group=self.layout.replica_group, group_src=0)
        return bool(said.item())


class _Push:
    """One round of a push, on rank 0: which servers still take part and what became of the others."""

    def __init__(self, sync: WeightSync, servers: list[Api], version: int) -> None:
        assert sync.loop and sync.transfer
        self.sync, self.loop, self.transfer = sync, sync.loop, sync.transfer
        self.deadline = Deadline(sync.settings.timeout_s)
        self.version, self.servers = version, servers
        self.live: list[Server] = []
        self.failures: Failures = {}
        self.expected: dict[tuple[int, torch.dtype, bool], Expected] = {}  # by what servers are alike in
        self.sent, self.count, self.bytes = 0, 0, 0
        self.under_way: Future[Failures] | None = None

    @property
    def takes_more(self) -> bool:
        return bool(self.live) and not self.transfer.broken

    def begin(self, count: int, check: bool) -> None:
        self.count = count
        self.loop.call(self._begin())
        if check:
            for server in self.live:
                for kind in _kinds(server, self.sync.arch):
                    self.expected[kind] = self.expected.get(kind) or Expected(self.sync.arch, *kind)

    def send(self, named: Named) -> None:
        """Hand a bucket on. It is loaded while the next one is gathered."""
        packed = self.transfer.pack(named)
        self._wait()
        if not self.takes_more:
            return
        self.sent += 1
        self.bytes += sum(tensor.nbytes for _, tensor in named)
        self.under_way = self._start(self._send(packed, first=self.sent == 1, last=self.sent == self.count))
        for expected in self.expected.values():
            expected.add(named)

    def finish(self) -> None:
        self._wait()
        self.loop.call(self._finish())

    def _start(self, work: Coroutine[Any, Any, Failures]) -> Future[Failures]:
        return asyncio.run_coroutine_threadsafe(work, self.loop.loop)

    def _wait(self) -> None:
        if self.under_way:
            self._drop(self.under_way.result())
            self.under_way = None

    def _drop(self, failures: Failures) -> None:
        self.failures |= failures
        self.live = [server for server in self.live if server.url not in failures]

    async def _begin(self) -> None:
        found: dict[str, Server] = {}

        async def meet(server: Server) -> None:
            about = await server.api.get("/server_info", self.deadline.left(QUICK_S))
            model = await server.api.get("/model_info", self.deadline.left(QUICK_S))
            about["weight_version"] = model.get("weight_version")
            found[server.url] = Server(server.api, about)

        self._drop(await each([Server(api, {}) for api in self.servers], meet))
        self.live = [found[api.url] for api in self.servers if api.url in found]
        self._drop(await self.transfer.begin(self.live, self.version, self.deadline))

    async def _send(self, packed: Any, first: bool, last: bool) -> Failures:
        failures: Failures = {}
        if first if self.transfer.in_session else last:
            failures = await each(self.live, self._pause)
        taking = [server for server in self.live if server.url not in failures]
        flush = last and self.sync.settings.pause != "in_place"  # there running answers go on with what they have
        update = Update(str(self.version) if last else None, flush)
        if taking:
            failures |= await self.transfer.send(taking, packed, update, self.deadline)
        return failures

    async def _pause(self, server: Server) -> None:
        if self.sync.settings.pause != "wait":
            await server.api.post("/pause_generation", {"mode": self.sync.settings.pause}, self.deadline.left(QUICK_S))
        if self.transfer.in_session:
            await self._session(server)

    async def _session(self, server: Server) -> None:
        """Open one; one that an earlier sync has left open is ended first."""
        for attempt in range(2):
            try:
                await server.api.post("/begin_weight_update", {}, self.deadline.left(QUICK_S))
                return
            except ServerError as error:
                if attempt or "already open" not in error.message:
                    raise
                await server.api.post("/end_weight_update", {}, self.deadline.left(QUICK_S))

    async def _finish(self) -> None:
        if not self.transfer.broken:
            self._drop(await each(self.live, self._settle))
        await self.transfer.end()
        failed = [Server(api, {}) for api in self.servers if api.url in self.failures]
        await each(failed, self._abandon)

    async def _settle(self, server: Server) -> None:
        """The server has loaded all: is it all right, and may it go on?"""
        api = server.api
        if self.transfer.in_session:
            await api.post("/end_weight_update", {}, self.deadline.left())
        found = (await api.get("/model_info", self.deadline.left(QUICK_S))).get("weight_version")
        if found != str(self.version):
            raise ServerError(api.url, f"says weight_version = {found!r} after it was given {self.version}")
        if self.expected:
            await self._compare(server)
        await api.post("/continue_generation", {}, self.deadline.left(QUICK_S))

    async def _compare(self, server: Server) -> None:
        ranks = (await server.api.post("/weights_checker", {"action": "checksum"}, self.deadline.left()))["ranks"]
        kinds = [self.expected[kind] for kind in _kinds(server, self.sync.arch)]
        if not kinds or any(expected.quantized for expected in kinds):
            self.sync.warn(
                f"{server.url}: not all of its weights can be compared (quantized, or not only tensor-parallel)"
            )
        differences = [expected.difference(ranks) for expected in kinds]
        if differences and all(differences):
            raise ServerError(server.url, f"took the weights, but {min(differences, key=len)}; is it of another model?")

    async def _abandon(self, server: Server) -> None:
        """Half of its weights may be new: what it is answering must not come back, and it must not begin more."""
        with contextlib.suppress(ServerError):  # dead, or hung: whoever watches the servers sees to that
            await server.api.post("/pause_generation", {"mode": "abort"}, CLEAN_UP_S)


def _kinds(server: Server, arch: Architecture) -> list[tuple[int, torch.dtype, bool]]:
    """What digests may fit this server: (ranks, type, on CUDA). None where its tensors lie in another way."""
    about = server.about
    uneven = arch.heads % server.tp or arch.kv_heads % server.tp  # on CPU SGLang then invents heads
    if any(int(about.get(name) or 1) > 1 for name in ("pp_size", "dp_size")) or (
        about.get("device") == "cpu" and uneven
    ):
        return []
    dtypes = [DTYPES[about["dtype"]]] if about.get("dtype") in DTYPES else list(dict.fromkeys(DTYPES.values()))
    return [(server.tp, dtype, about.get("device") == "cuda") for dtype in dtypes]
