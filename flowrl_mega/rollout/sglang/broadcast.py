"""Weights by broadcast: one process group of the trainer's first rank and the ranks of all servers."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import uuid
from collections.abc import Awaitable, Callable
from datetime import timedelta
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.nodes import address_towards
from flowrl_mega.rollout.sglang.transfers import Buffers, Deadline, Failures, Named, Packed, SyncTarget, Update, each

T = TypeVar("T")
Requests = dict[asyncio.Task[None], SyncTarget]  # under way, with the server that each was sent to
GRACE_S = 10.0  # for servers to notice that the group has lost a member
MEET_S = 1.0  # for servers to reach the store of a group that fails: one that comes after it is gone waits for long


class Broadcast:
    """NCCL between GPUs, gloo on CPU. The group lasts until its servers change or one of them fails.

    A member that fails may leave the others waiting for it. Then this round is over for all (`broken`): the group is
    destroyed, the member that failed is named, and the others can be sent everything again in a new group.
    """

    in_session = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.broken = device, False
        self.members: dict[str, str] = {}  # the last version of each server in the group, by URL
        self.servers: list[SyncTarget] = []
        self.name = ""
        self.group: dist.ProcessGroup | None = None
        self.store: dist.TCPStore | None = None
        self.buffers: Buffers | None = None

    async def begin(self, servers: list[SyncTarget], version: int, deadline: Deadline) -> Failures:
        if self.broken or not self.buffers:  # a thread that has not returned may still read the old ones
            self.buffers, self.broken = Buffers(self._empty), False
        unsuited = {
            server.url: f"has {name} = {server.about[name]}, which rollout.sync.transfer = distributed cannot reach; "
            "take disk"
            for server in servers
            for name in ("pp_size", "dp_size")
            if int(server.about.get(name) or 1) > 1
        }
        servers = [server for server in servers if server.url not in unsuited]
        known = {server.url: server.about.get("weight_version") for server in servers}
        if self.members != known:  # other servers, or one that was restarted and knows no group
            await self._leave()
            return unsuited | (await self._join(servers, deadline) if servers else {})
        return unsuited

    def pack(self, named: Named) -> Packed:
        assert self.buffers, "begin() comes first"
        return self.buffers.pack(named)

    async def send(self, servers: list[SyncTarget], packed: Packed, update: Update, deadline: Deadline) -> Failures:
        if not self.broken and [server.url for server in servers] != [server.url for server in self.servers]:
            self.broken = True  # one has failed since it joined
            await self._leave()
        if self.broken:
            return {}
        body = {
            "names": [name for name, _ in packed.named],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in packed.named],
            "shapes": [list(tensor.shape) for _, tensor in packed.named],
            "group_name": self.name,
            "load_format": "flattened_bucket",
            **update.body(),
        }
        failures = await self._together(
            "update_weights_from_distributed",
            servers,
            lambda server: server.client.update_weights_from_distributed(body, deadline.left()),
            lambda: self._broadcast(packed.flat),
        )
        if update.version and not failures:
            self.members = {server.url: update.version for server in servers}
        return failures

    async def end(self) -> None:
        if self.device.type == "cuda":
            self.buffers = None  # memory for the trainer; on CPU new pages cost as much as what is copied there

    async def close(self) -> None:
        await self._leave()

    async def _join(self, servers: list[SyncTarget], deadline: Deadline) -> Failures:
        """Make a new group of this process, as rank 0, and the servers' ranks in order."""
        address = _own_address(servers)
        starts, world = {}, 1
        for server in servers:
            starts[server.url] = world
            world += server.tp
        timeout = timedelta(seconds=deadline.left())
        name = f"flowrl-mega-{uuid.uuid4().hex[:8]}"
        self.name, self.servers = name, servers
        # Not the store that `join` waits in: when this one goes, all that wait for a missing member get an error.
        self.store = dist.TCPStore(address, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        port = self.store.port
        backend = "nccl" if self.device.type == "cuda" else "gloo"

        def ask(server: SyncTarget) -> Awaitable[None]:
            rendezvous = {"master_address": address, "master_port": port, "rank_offset": starts[server.url]}
            body = {**rendezvous, "world_size": world, "group_name": name, "backend": backend}
            return server.client.init_weights_update_group(body, deadline.left())

        def join() -> None:
            store = dist.TCPStore(address, port, world, timeout=timeout)
            group = _group(store, backend, world, name, timeout, self.device)
            if self.name == name:  # else the group has been given up meanwhile
                self.group = group

        return await self._together("init_weights_update_group", servers, ask, join)

    async def _leave(self, servers: list[SyncTarget] | None = None) -> None:
        """Destroy the group here and on these of its servers (None: all of them)."""
        if self.name:
            name, group = self.name, self.group
            await self._destroy(name, self.servers if servers is None else servers)
            if group is not None:
                _in_thread(lambda: dist.destroy_process_group(group))  # NCCL may wait for members that are gone
            self.name, self.group, self.store, self.servers, self.members = "", None, None, [], {}

    async def _destroy(self, name: str, servers: list[SyncTarget]) -> None:
        """Some of the servers may never have joined it."""
        await each(servers, lambda server: server.client.destroy_weights_update_group(name, GRACE_S / 2))

    async def _together(
        self,
        endpoint: str,
        servers: list[SyncTarget],
        ask: Callable[[SyncTarget], Awaitable[None]],
        our_part: Callable[[], None],
    ) -> Failures:
        """Take part in a collective: ask every server to, and do our part in a thread.

        If anything fails, the group is destroyed, and the failures are those of the servers whose fault it was.
        """
        requests = {asyncio.ensure_future(ask(server)): server for server in servers}
        ours = _in_thread(our_part)
        ours.add_done_callback(lambda ended: ended.exception())  # it may end when nobody awaits it any more
        done, pending = await asyncio.wait([*requests, ours], return_when=asyncio.FIRST_EXCEPTION)
        if not any(task.exception() for task in done):
            return {}
        our_error = ours.exception() if ours.done() else None
        await self._give_up(requests, pending - {ours})
        return _culprits(endpoint, requests) or {server.url: f"/{endpoint}: {our_error}" for server in servers}

    async def _give_up(self, requests: Requests, pending: set[asyncio.Future[Any]]) -> None:
        """Destroy the group so that servers that wait in it return; `pending` requests get GRACE_S to do so."""
        self.broken, name = True, self.name
        if self.group is None:  # some servers may still be on their way to the store
            await asyncio.sleep(MEET_S)
        await self._leave([server for task, server in requests.items() if task.done() and not _is_lost(task)])
        if pending:
            await asyncio.wait(pending, timeout=GRACE_S)
            returned = [server for task, server in requests.items() if task in pending and task.done()]
            await self._destroy(name, returned)

    def _broadcast(self, flat: torch.Tensor) -> None:
        dist.broadcast(flat, 0, group=self.group)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # the buffer is filled again after this

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def _culprits(endpoint: str, requests: Requests) -> Failures:
    """The servers that made a collective fail; if all only suffered from it, these."""
    culprits, bystanders = Failures(), Failures()
    for task, server in requests.items():
        if not task.done():
            task.cancel()
            culprits[server.url] = f"/{endpoint}: waits for a group that is gone"
        elif isinstance(error := task.exception(), ServerError):
            suffered = "Failed to receive" in error.message or "Failed to initialize custom" in error.message
            (bystanders if suffered else culprits)[server.url] = error.message
        elif error:
            raise error
    return culprits or bystanders


def _is_lost(task: asyncio.Future[Any]) -> bool:
    """Whether a request has failed without an answer."""
    error = task.exception()
    return isinstance(error, ServerError) and error.status == 0


def _own_address(servers: list[SyncTarget]) -> str:
    """The address under which the servers reach this host."""
    found = [address_towards(urlsplit(server.url).hostname or "127.0.0.1") for server in servers]
    return next((address for address in found if not address.startswith(("127.", "::1"))), found[0])


def _group(
    store: Any, backend: str, world: int, name: str, timeout: timedelta, device: torch.device
) -> dist.ProcessGroup:
    """A process group beside the job's, by the same steps as SGLang's: torch's own API takes ranks of the job only."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # the current device is per thread
    group, _ = distributed_c10d._new_process_group_helper(
        world,
        0,
        [],
        distributed_c10d.Backend(backend),
        dist.PrefixStore(name, store),
        group_name=cast(Any, name),
        timeout=timeout,
    )
    distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world)}
    return group


def _in_thread(work: Callable[[], T]) -> asyncio.Future[T]:
    """Run `work` in a daemon thread: one that never returns must not keep this process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[T] = loop.create_future()

    def finish(result: T | None, error: BaseException | None) -> None:
        if not future.done():
            future.set_exception(error) if error else future.set_result(result)  # type: ignore[arg-type]

    def run() -> None:
        result, error = None, None
        try:
            result = work()
        except Exception as raised:
            error = raised
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(finish, result, error)

    threading.Thread(target=run, name="broadcast", daemon=True).start()
    return future
