"""Pushes the policy's weights to the servers: pauses them, sends bucket by bucket, and checks what they hold."""

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
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.loop_thread import LoopThread
from flowrl_mega.rollout.sglang.broadcast import Broadcast
from flowrl_mega.rollout.sglang.checksums import DTYPES, Expected
from flowrl_mega.rollout.sglang.endpoints import SglangServer
from flowrl_mega.rollout.sglang.quantize import to_fp8, with_quantization
from flowrl_mega.rollout.sglang.transfers import (
    Deadline,
    Disk,
    Failures,
    Named,
    SharedMemory,
    SyncTarget,
    Transfer,
    Update,
    each,
)

QUICK_S = 60.0  # for requests that a server answers at once
CLEAN_UP_S = 5.0  # for a server that has just failed


class WeightSync:
    """Making it and `push` are collective; only ranks that have a `loop` talk to servers, each to its own.

    `side_files`: config and tokenizer files of the model, by name. `folder`: for transfer disk, if the settings name
    none.
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
        ] = {}  # of the last push: perf/push_seconds; perf/push_gb, the bytes sent to each server in 1e9
        self.warned = False
        # By rank of this replica, which together hold one model: who gives weights to servers.
        self.givers = [False] * layout.replica_group.size()
        dist.all_gather_object(self.givers, loop is not None, group=layout.replica_group)
        self.transfer: Transfer | None = None
        if loop:
            kind = settings.way(colocated)
            if kind == "disk":
                files = with_quantization(side_files) if settings.dtype == "fp8" else side_files
                self.transfer = Disk(Path(settings.folder) if settings.folder else folder, files)
            else:
                self.transfer = SharedMemory(layout.device) if kind == "tensor" else Broadcast(layout.device)

    def push(self, policy: Policy, servers: list[SglangServer], version: int, check: bool) -> dict[str, str]:
        """Give every server the policy's weights, as `version`. Collective.

        `servers` is read on ranks with a loop only. With `check`, checksums of all tensors on the servers are compared.
        These ranks get {url: reason} of their servers that did not take the weights; they stay paused, and their
        answers are aborted, until a later push succeeds. Other ranks get {}; replicas without such a rank have nothing
        to do.
        """
        if not any(self.givers):
            return {}
        start, failures = time.monotonic(), dict[str, str]()
        left = list(servers) if self.loop else []
        while True:
            push = _Push(self, left, version) if left else None
            self._round(policy, push, check)
            if push:
                failures |= push.failures
                left = [server.client for server in push.live] if push.transfer.broken else []
                self.metrics = {"perf/push_seconds": time.monotonic() - start, "perf/push_gb": push.bytes / 1e9}
            if not self._any(bool(left)):
                return failures

    def close(self) -> None:
        """Destroy process groups and remove written files."""
        if self.loop and self.transfer:
            self.loop.call(self.transfer.close())

    def warn(self, message: str) -> None:
        """Print the first warning, no later one. For the event loop's thread."""
        if not self.warned:
            self.warned = True
            print(f"flowrl-mega: {message}", file=sys.stderr, flush=True)

    def _round(self, policy: Policy, push: _Push | None, check: bool) -> None:
        """Send all buckets once. The ranks gather them to the end, even if all servers fail."""
        dtype = torch.bfloat16 if self.settings.dtype == "bf16" else None
        bucket_bytes = self.settings.bucket_mb << 20
        buckets = Buckets(policy, bucket_bytes, dtype, to_all=any(self.givers[1:]))
        if push:
            push.begin(len(buckets), check)
        for bucket in buckets:
            if push and push.takes_more:
                push.send(to_fp8(bucket) if self.settings.dtype == "fp8" else bucket)
        if push:
            push.finish()

    def _any(self, value: bool) -> bool:
        """Whether it is true on any rank of the replica."""
        if self.layout.replica_group.size() == 1:
            return value
        shared = torch.tensor([value], dtype=torch.uint8, device=self.layout.device)
        dist.all_reduce(shared, dist.ReduceOp.MAX, group=self.layout.replica_group)
        return bool(shared.item())


class _Push:
    """One round of a push by one rank: the servers that still take part (`live`) and why others do not (`failures`)."""

    def __init__(self, sync: WeightSync, servers: list[SglangServer], version: int) -> None:
        assert sync.loop and sync.transfer
        self.sync, self.loop, self.transfer = sync, sync.loop, sync.transfer
        self.deadline = Deadline(sync.settings.timeout_s)
        self.version, self.servers = version, servers
        self.live: list[SyncTarget] = []
        self.failures: Failures = {}
        self.expected: dict[tuple[int, torch.dtype, bool], Expected] = {}  # by kind of server
        self.sent, self.count, self.bytes = 0, 0, 0
        self.under_way: Future[Failures] | None = None  # the bucket that is being loaded

    @property
    def takes_more(self) -> bool:
        """Whether there is somebody to send the next bucket to."""
        return bool(self.live) and not self.transfer.broken

    def begin(self, count: int, check: bool) -> None:
        """Prepare for `count` buckets."""
        self.count = count
        self.loop.call(self._begin())
        if check:
            for server in self.live:
                for kind in _kinds(server, self.sync.arch):
                    self.expected[kind] = self.expected.get(kind) or Expected(self.sync.arch, *kind)

    def send(self, named: Named) -> None:
        """Send a bucket. Servers load it while the next one is gathered."""
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
        """Wait for the last bucket, check what the servers hold, and let them go on."""
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
        found: dict[str, SyncTarget] = {}

        async def meet(server: SyncTarget) -> None:
            about = await server.client.server_info(self.deadline.left(QUICK_S))
            model = await server.client.model_info(self.deadline.left(QUICK_S))
            about["weight_version"] = model.get("weight_version")
            found[server.url] = SyncTarget(server.client, about)

        self._drop(await each([SyncTarget(client, {}) for client in self.servers], meet))
        self.live = [found[client.url] for client in self.servers if client.url in found]
        self._drop(await self.transfer.begin(self.live, self.version, self.deadline))

    async def _send(self, packed: Any, first: bool, last: bool) -> Failures:
        failures: Failures = {}
        if first if self.transfer.in_session else last:
            failures = await each(self.live, self._pause)
        taking = [server for server in self.live if server.url not in failures]
        flush = last and self.sync.settings.pause != "in_place"  # in_place: running answers keep their cache
        update = Update(str(self.version) if last else None, flush)
        if taking:
            failures |= await self.transfer.send(taking, packed, update, self.deadline)
        return failures

    async def _pause(self, server: SyncTarget) -> None:
        if self.sync.settings.pause != "wait":
            await server.client.pause_generation(self.sync.settings.pause, self.deadline.left(QUICK_S))
        if self.transfer.in_session:
            await self._session(server)

    async def _session(self, server: SyncTarget) -> None:
        """Open an update session; one that an earlier sync has left open is ended first."""
        for attempt in range(2):
            try:
                await server.client.begin_weight_update(self.deadline.left(QUICK_S))
                return
            except ServerError as error:
                if attempt or "already open" not in error.message:
                    raise
                await server.client.end_weight_update(self.deadline.left(QUICK_S))

    async def _finish(self) -> None:
        if not self.transfer.broken:
            self._drop(await each(self.live, self._settle))
        await self.transfer.end()
        failed = [SyncTarget(client, {}) for client in self.servers if client.url in self.failures]
        await each(failed, self._abandon)

    async def _settle(self, server: SyncTarget) -> None:
        """Check a server that has loaded everything, and let it generate again. Raises ServerError."""
        client = server.client
        if self.transfer.in_session:
            await client.end_weight_update(self.deadline.left())
        found = (await client.model_info(self.deadline.left(QUICK_S))).get("weight_version")
        if found != str(self.version):
            raise ServerError(client.url, f"says weight_version = {found!r} after it was given {self.version}")
        if self.expected:
            await self._compare(server)
        await client.continue_generation(self.deadline.left(QUICK_S))

    async def _compare(self, server: SyncTarget) -> None:
        ranks = (await server.client.weights_checker("checksum", self.deadline.left()))["ranks"]
        kinds = [self.expected[kind] for kind in _kinds(server, self.sync.arch)]
        if not kinds or any(expected.quantized for expected in kinds):
            self.sync.warn(
                f"{server.url}: not all of its weights can be compared (quantized, or not only tensor-parallel)"
            )
        differences = [expected.difference(ranks) for expected in kinds]
        if differences and all(differences):
            raise ServerError(server.url, f"took the weights, but {min(differences, key=len)}; is it of another model?")

    async def _abandon(self, server: SyncTarget) -> None:
        """Half of its weights may be new: abort its answers, and keep it paused so that it begins no more."""
        with contextlib.suppress(ServerError):  # dead or hanging: Health sees to that
            await server.client.pause_generation("abort", CLEAN_UP_S)


def _kinds(server: SyncTarget, arch: Architecture) -> list[tuple[int, torch.dtype, bool]]:
    """The kinds of digests that may fit, as (ranks, type, on CUDA); [] if the server lays tensors out otherwise."""
    about = server.about
    uneven = arch.heads % server.tp or arch.kv_heads % server.tp  # on CPU SGLang then invents heads
    if any(int(about.get(name) or 1) > 1 for name in ("pp_size", "dp_size")) or (
        about.get("device") == "cpu" and uneven
    ):
        return []
    dtypes = [DTYPES[about["dtype"]]] if about.get("dtype") in DTYPES else list(dict.fromkeys(DTYPES.values()))
    return [(server.tp, dtype, about.get("device") == "cuda") for dtype in dtypes]
