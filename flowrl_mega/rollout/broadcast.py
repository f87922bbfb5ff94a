"""One broadcast of each bucket to all servers: a process group of the trainer's first rank and every server's ranks."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
import uuid
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar, cast
from urllib.parse import urlsplit

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d

from flowrl_mega.rollout.api import ServerError
from flowrl_mega.rollout.transfers import Buffers, Deadline, Failures, Named, Packed, Server, Update, each

T = TypeVar("T")
GRACE_S = 10.0  # for servers to notice that the group has lost a member
MEET_S = 1.0  # for servers that are asked to join to find the place: one that comes when it is gone waits for long


class Broadcast:
    """NCCL between GPUs, gloo on CPU. The group lasts until its servers change or one of them fails.

    A member that fails may leave the others waiting for it. Then this round is over for all: the group is dropped,
    the one that failed is named, and the others can be sent everything again in a group of their own.
    """

    in_session = True

    def __init__(self, device: torch.device) -> None:
        self.device, self.broken = device, False
        self.members: dict[str, str] = {}  # the version that each server of the group was given last, by URL
        self.servers: list[Server] = []
        self.name = ""
        self.group: dist.ProcessGroup | None = None
        self.store: dist.TCPStore | None = None
        self.buffers: Buffers | None = None

    async def begin(self, servers: list[Server], version: int, deadline: Deadline) -> Failures:
        if self.broken or not self.buffers:  # a thread that did not come back may still read the old ones
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
        if self.members != known:  # another set, or one that has started anew and knows no group
            await self._leave()
            return unsuited | (await self._join(servers, deadline) if servers else {})
        return unsuited

    def pack(self, named: Named) -> Packed:
        assert self.buffers, "begin() comes first"
        return self.buffers.pack(named)

    async def send(self, servers: list[Server], packed: Packed, update: Update, deadline: Deadline) -> Failures:
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
        failures = await self._with_all(
            servers, "/update_weights_from_distributed", lambda _: body, lambda: self._broadcast(packed.flat), deadline
        )
        if update.version and not failures:
            self.members = {server.url: update.version for server in servers}
        return failures

    async def end(self) -> None:
        if self.device.type == "cuda":
            self.buffers = None  # memory for the trainer; on CPU new pages cost as much as what is copied there

    async def close(self) -> None:
        await self._leave()

    async def _join(self, servers: list[Server], deadline: Deadline) -> Failures:
        """A new group of this process, as rank 0, and the servers' ranks in order."""
        address = _own_address(servers)
        starts, world = {}, 1
        for server in servers:
            starts[server.url] = world
            world += server.tp
        timeout = timedelta(seconds=deadline.left())
        name = f"flowrl-mega-{uuid.uuid4().hex[:8]}"
        self.name, self.servers = name, servers
        # Apart from the one that `join` waits in: when it goes, all who wait for a member that does not come are told.
        self.store = dist.TCPStore(address, 0, world, is_master=True, timeout=timeout, wait_for_workers=False)
        port = self.store.port
        backend = "nccl" if self.device.type == "cuda" else "gloo"

        def body(server: Server) -> dict[str, Any]:
            place = {"master_address": address, "master_port": port, "rank_offset": starts[server.url]}
            return {**place, "world_size": world, "group_name": name, "backend": backend}

        def join() -> None:
            store = dist.TCPStore(address, port, world, timeout=timeout)
            group = _group(store, backend, world, name, timeout, self.device)
            if self.name == name:  # else it comes too late
                self.group = group

        return await self._with_all(servers, "/init_weights_update_group", body, join, deadline)

    async def _leave(self, servers: list[Server] | None = None) -> None:
        """Drop the group here and on these servers, of all that are in it."""
        if self.name:
            name, group = self.name, self.group
            await self._destroy(name, self.servers if servers is None else servers)
            if group is not None:
                _in_thread(lambda: dist.destroy_process_group(group))  # NCCL may wait for members that are gone
            self.name, self.group, self.store, self.servers, self.members = "", None, None, [], {}

    async def _destroy(self, name: str, servers: list[Server]) -> None:
        path, body = "/destroy_weights_update_group", {"group_name": name}
        await each(servers, lambda server: server.api.post(path, body, GRACE_S / 2))  # some may never have had it

    async def _with_all(
        self,
        servers: list[Server],
        path: str,
        body: Callable[[Server], dict[str, Any]],
        ours: Callable[[], None],
        deadline: Deadline,
    ) -> Failures:
        """Ask all servers and do our part. Where not all of that works, drop the group and say whose fault it was."""
        asked = {
            asyncio.ensure_future(server.api.post(path, body(server), deadline.left())): server for server in servers
        }
        part = _in_thread(ours)
        part.add_done_callback(lambda ended: ended.exception())  # it may end when nobody waits any more
        done, waiting = await asyncio.wait([*asked, part], return_when=asyncio.FIRST_EXCEPTION)
        if not any(task.exception() for task in done):
            return {}
        self.broken, name, joined = True, self.name, self.group is not None
        reason = part.exception() if part.done() else None
        if not joined:
            await asyncio.sleep(MEET_S)
        answered = [server for task, server in asked.items() if task.done() and not _is_lost(task)]
        await self._leave(answered)  # which frees those that wait for one of them
        if waiting := waiting - {part}:
            await asyncio.wait(waiting, timeout=GRACE_S)
            await self._destroy(name, [server for task, server in asked.items() if task in waiting and task.done()])
        failures, bystanders = Failures(), Failures()
        for task, server in asked.items():
            if not task.done():
                task.cancel()
                failures[server.url] = f"{path}: waits for a group that is gone"
            elif isinstance(error := task.exception(), ServerError):
                lost = "Failed to receive" in error.message or "Failed to initialize custom" in error.message
                (bystanders if lost else failures)[server.url] = error.message
            elif error:
                raise error
        own = {server.url: f"{path}: {reason}" for server in servers} if reason else {}
        return failures or bystanders or own

    def _broadcast(self, flat: torch.Tensor) -> None:
        dist.broadcast(flat, 0, group=self.group)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # the buffer is filled again after this

    def _empty(self, size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.uint8, device=self.device)


def _is_lost(task: asyncio.Future[Any]) -> bool:
    """It did not answer at all."""
    error = task.exception()
    return isinstance(error, ServerError) and error.status == 0


def _own_address(servers: list[Server]) -> str:
    """This host as the servers reach it."""
    found = []
    for server in servers:
        host = urlsplit(server.url).hostname or "127.0.0.1"
        family, kind, _, _, place = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)  # sends nothing
            found.append(probe.getsockname()[0])
    return next((address for address in found if not address.startswith(("127.", "::1"))), found[0])


def _group(
    store: Any, backend: str, world: int, name: str, timeout: timedelta, device: torch.device
) -> dist.ProcessGroup:
    """A group beside the job's: torch itself makes them of the job's ranks only. The same steps as SGLang's."""
    if device.type == "cuda":
        torch.cuda.set_device(device)  # of this thread
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
    """Run it in a thread of its own: one that never comes back must not hold up the end of this process."""
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
