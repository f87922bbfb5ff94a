"""How named tensors reach the servers: in files that they read or in memory that they map (or by broadcast.py)."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import io
import json
import shutil
import time
from collections.abc import Awaitable, Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from flowrl_mega.model.hf_folder import INDEX
from flowrl_mega.rollout.http_client import ServerError
from flowrl_mega.rollout.sglang.endpoints import SglangServer

Named = list[tuple[str, Tensor]]
Failures = dict[str, str]  # what went wrong, by URL of the server


class SyncTarget(NamedTuple):
    """A server that gets weights, and what it says of itself."""

    client: SglangServer
    about: dict[str, Any]  # its server_info, and weight_version

    @property
    def url(self) -> str:
        return self.client.url

    @property
    def tp(self) -> int:
        return int(self.about.get("tp_size") or 1)


class Update(NamedTuple):
    """What the servers do after they have loaded a bucket."""

    version: str | None  # set with the last bucket
    flush_cache: bool

    def body(self) -> dict[str, Any]:
        """The fields of a request that all transfers share."""
        return {"flush_cache": self.flush_cache} | ({"weight_version": self.version} if self.version else {})


class Deadline:
    """The time by which a sync has to be over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self, most: float = float("inf")) -> float:
        """Seconds left, at most `most` and at least 1, so that a last request still gets its answer."""
        return max(1.0, min(most, self.end - time.monotonic()))


class Transfer(Protocol):
    """A way to send weights, on rank 0. `pack` runs in the thread that gathers, coroutines in the event loop."""

    in_session: bool  # each bucket is loaded as it comes, between begin_weight_update and end_weight_update
    broken: bool  # the failure of one server has ended this round for all

    def pack(self, named: Named) -> Any:
        """A bucket for `send`. It must stay valid until the second call after this one."""

    async def begin(self, servers: list[SyncTarget], version: int, deadline: Deadline) -> Failures:
        """Prepare to send `version` to these servers."""

    async def send(self, servers: list[SyncTarget], packed: Any, update: Update, deadline: Deadline) -> Failures:
        """Send a bucket and wait until the servers have loaded it."""

    async def end(self) -> None:
        """Free what a finished sync no longer needs."""

    async def close(self) -> None:
        """Remove everything, here and on the servers."""


async def each(servers: list[SyncTarget], ask: Callable[[SyncTarget], Awaitable[Any]]) -> Failures:
    """Run `ask` for all servers at once; the reasons of those for which it raised."""
    results = await asyncio.gather(*(ask(server) for server in servers), return_exceptions=True)
    failures = {}
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, ServerError):
            failures[server.url] = result.message
        elif isinstance(result, Exception):  # a response of another form than SGLang's
            failures[server.url] = repr(result)
        elif isinstance(result, BaseException):
            raise result
    return failures


async def load(server: SyncTarget, update: Awaitable[None]) -> None:
    """Await a server's weight update. A server does not survive tensors of a shape that it does not expect."""
    try:
        await update
    except ServerError as error:
        if error.status:
            raise
        reason = "lost while it loaded weights; its log says why (is it of another model?)"
        raise ServerError(server.url, f"{error.message}: {reason}") from None


class Packed(NamedTuple):
    flat: Tensor  # [bytes] uint8
    named: Named  # views of it, end to end


class Buffers:
    """Two buffers that take turns: one is being sent while the other is filled. `make(bytes)` allocates one."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._spare, self._last = make(0), make(0)

    def pack(self, named: Named) -> Packed:
        """The tensors copied end to end into the buffer that is not being sent."""
        named = sorted(named, key=lambda pair: -pair[1].dtype.itemsize)  # each then starts at a multiple of its size
        size = sum(tensor.nbytes for _, tensor in named)
        self._spare, self._last = self._last, self._spare
        if self._last.numel() < size:
            self._last = self._make(size)
        flat, views, end = self._last[:size], [], 0
        for name, tensor in named:
            start, end = end, end + tensor.nbytes
            views.append((name, flat[start:end].view(tensor.dtype).view(tensor.shape)))
            views[-1][1].copy_(tensor)
        if flat.is_cuda:
            torch.cuda.synchronize(flat.device)  # readers do not wait for this thread's stream
        return Packed(flat, views)


class Disk:
    """One Hugging Face folder per version, inside a folder that all servers see under the same path."""

    in_session = broken = False

    def __init__(self, folder: Path, side_files: dict[str, bytes]) -> None:
        self.folder, self.side_files = folder, side_files
        self.target = folder

    def pack(self, named: Named) -> Named:
        return [(name, tensor.contiguous()) for name, tensor in named]

    async def begin(self, servers: list[SyncTarget], version: int, deadline: Deadline) -> Failures:
        self.target, self.file_of, self.bytes = (self.folder / f"version_{version}").absolute(), dict[str, str](), 0
        return await self._on_disk(servers, self._make_folder)

    async def send(self, servers: list[SyncTarget], packed: Named, update: Update, deadline: Deadline) -> Failures:
        failures = await self._on_disk(servers, lambda: self._write(packed, last=update.version is not None))
        if failures or update.version is None:
            return failures
        body = {"model_path": str(self.target), "load_format": "auto", **update.body()}
        return await each(
            servers, lambda server: load(server, server.client.update_weights_from_disk(body, deadline.left()))
        )

    async def end(self) -> None:
        self._remove(lambda old: old != self.target)

    async def close(self) -> None:
        self._remove(lambda old: True)

    async def _on_disk(self, servers: list[SyncTarget], work: Callable[[], None]) -> Failures:
        try:
            await asyncio.to_thread(work)
        except OSError as error:
            reason = f"rollout.sync.folder: {self.target} cannot be written ({error.strerror or error})"
            return {server.url: reason for server in servers}
        return {}

    def _make_folder(self) -> None:
        shutil.rmtree(self.target, ignore_errors=True)
        self.target.mkdir(parents=True)
        for name, content in self.side_files.items():
            (self.target / name).write_bytes(content)

    def _write(self, named: Named, last: bool) -> None:
        file = f"model-{len(set(self.file_of.values())) + 1:05}.safetensors"
        try:
            save_file(dict(named), self.target / file, metadata={"format": "pt"})
        except Exception as error:  # the Rust writer has an exception class of its own
            raise OSError(str(error)) from None
        self.file_of |= {name: file for name, _ in named}
        self.bytes += sum(tensor.nbytes for _, tensor in named)
        if last:
            index = {"metadata": {"total_size": self.bytes}, "weight_map": self.file_of}
            (self.target / INDEX).write_text(json.dumps(index, indent=2))

    def _remove(self, is_old: Callable[[Path], bool]) -> None:
        for old in self.folder.absolute().glob("version_*"):
            if is_old(old):
                shutil.rmtree(old, ignore_errors=True)


class SharedMemory:
    """Each bucket in memory that servers on this host map: POSIX shared memory, or CUDA IPC handles."""

    in_session, broken = True, False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: Buffers | None = None

    async def begin(self, servers: list[SyncTarget], version: int, deadline: Deadline) -> Failures:
        self.buffers = self.buffers or Buffers(self._shared)
        return {}

    def pack(self, named: Named) -> Packed:
        assert self.buffers, "begin() comes first"
        return self.buffers.pack(named)

    async def send(self, servers: list[SyncTarget], packed: Packed, update: Update, deadline: Deadline) -> Failures:
        async def ask(server: SyncTarget) -> None:
            payload = [_pickled(packed.named) for _ in range(server.tp)]  # CUDA: a handle may be opened once
            body = {"serialized_named_tensors": payload, **update.body()}
            await load(server, server.client.update_weights_from_tensor(body, deadline.left()))

        return await each(servers, ask)

    async def end(self) -> None:
        if self.device.type == "cuda":
            self.buffers = None  # memory for the trainer; on CPU new pages cost as much as what is copied there

    async def close(self) -> None:
        self.buffers = None

    def _shared(self, size: int) -> Tensor:
        buffer = torch.empty(size, dtype=torch.uint8, device=self.device)
        with _by_file_name():
            return buffer if buffer.is_cuda else buffer.share_memory_()


@contextlib.contextmanager
def _by_file_name() -> Iterator[None]:
    """Pass shared memory on by name. torch's default, open files, kills a process that is not our child."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class _Handle:
    """A tensor that pickles as torch hands it to processes, but names its GPU by UUID: GPU numbers may differ there."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor

    def __reduce__(self) -> tuple[Any, ...]:
        rebuild, arguments = reduce_tensor(self.tensor)
        if self.tensor.is_cuda:
            name = str(torch.cuda.get_device_properties(arguments[6]).uuid)
            arguments = (*arguments[:6], name, *arguments[7:])
        return rebuild, arguments


def _pickled(named: Named) -> str:
    stream = io.BytesIO()
    with _by_file_name():
        ForkingPickler(stream).dump([(name, _Handle(tensor)) for name, tensor in named])
    return base64.b64encode(stream.getvalue()).decode()
