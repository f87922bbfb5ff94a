"""Three ways of named tensors to servers: files that they read, memory that they map, a broadcast that they join."""

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
from flowrl_mega.rollout.api import Api, ServerError

Named = list[tuple[str, Tensor]]
Failures = dict[str, str]  # what went wrong, by the server's URL


class Server(NamedTuple):
    """A server and what it says of itself."""

    api: Api
    about: dict[str, Any]  # its /server_info

    @property
    def url(self) -> str:
        return self.api.url

    @property
    def tp(self) -> int:
        return int(self.about.get("tp_size") or 1)


class Update(NamedTuple):
    """What the servers are to do after they have loaded a bucket."""

    version: str | None  # given with the last
    flush_cache: bool

    def body(self) -> dict[str, Any]:
        return {"flush_cache": self.flush_cache} | ({"weight_version": self.version} if self.version else {})


class Deadline:
    """When a sync has to be over."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    def left(self, most: float = float("inf")) -> float:
        """Seconds, at least 1: what is asked at the end still gets an answer."""
        return max(1.0, min(most, self.end - time.monotonic()))


class Transfer(Protocol):
    """Lives on rank 0. `pack` is for the thread that gathers, the coroutines are for the loop's."""

    in_session: bool  # each bucket is loaded as it comes, between begin_ and end_weight_update
    broken: bool  # one server's failure ended it for all

    def pack(self, named: Named) -> Any:
        """A bucket to `send`: what comes after the next call must not change it."""

    async def begin(self, servers: list[Server], version: int, deadline: Deadline) -> Failures: ...

    async def send(self, servers: list[Server], packed: Any, update: Update, deadline: Deadline) -> Failures: ...

    async def end(self) -> None:
        """The sync is over."""

    async def close(self) -> None:
        """Nothing is left of it, neither here nor on the servers."""


async def each(servers: list[Server], ask: Callable[[Server], Awaitable[Any]]) -> Failures:
    """All at once; of those that did not do it, why."""
    results = await asyncio.gather(*(ask(server) for server in servers), return_exceptions=True)
    failures = {}
    for server, result in zip(servers, results, strict=True):
        if isinstance(result, ServerError):
            failures[server.url] = result.message
        elif isinstance(result, Exception):  # an answer that is not what SGLang's is like
            failures[server.url] = repr(result)
        elif isinstance(result, BaseException):
            raise result
    return failures


async def load(server: Server, path: str, body: dict[str, Any], deadline: Deadline) -> None:
    """Have a server load weights. Tensors of a shape that it does not expect it does not survive."""
    try:
        await server.api.post(path, body, deadline.left())
    except ServerError as error:
        if error.status:
            raise
        reason = "lost while it loaded weights; its log says why (is it of another model?)"
        raise ServerError(server.url, f"{error.message}: {reason}") from None


class Packed(NamedTuple):
    flat: Tensor  # [bytes] uint8
    named: Named  # views of it, end to end


class Buffers:
    """Two that take turns: one is under way while the other is filled."""

    def __init__(self, make: Callable[[int], Tensor]) -> None:
        self._make = make
        self._spare, self._last = make(0), make(0)

    def pack(self, named: Named) -> Packed:
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
            torch.cuda.synchronize(flat.device)  # who reads it knows nothing of this thread's stream
        return Packed(flat, views)


class Disk:
    """A Hugging Face folder for each version, in a folder that all servers see under the same path."""

    in_session = broken = False

    def __init__(self, folder: Path, side_files: dict[str, bytes]) -> None:
        self.folder, self.side_files = folder, side_files
        self.target = folder

    def pack(self, named: Named) -> Named:
        return [(name, tensor.contiguous()) for name, tensor in named]

    async def begin(self, servers: list[Server], version: int, deadline: Deadline) -> Failures:
        self.target, self.file_of, self.bytes = (self.folder / f"version_{version}").absolute(), dict[str, str](), 0
        return await self._on_disk(servers, self._make_folder)

    async def send(self, servers: list[Server], packed: Named, update: Update, deadline: Deadline) -> Failures:
        failures = await self._on_disk(servers, lambda: self._write(packed, last=update.version is not None))
        if failures or update.version is None:
            return failures
        body = {"model_path": str(self.target), "load_format": "auto", **update.body()}
        return await each(servers, lambda server: load(server, "/update_weights_from_disk", body, deadline))

    async def end(self) -> None:
        self._remove(lambda old: old != self.target)

    async def close(self) -> None:
        self._remove(lambda old: True)

    async def _on_disk(self, servers: list[Server], work: Callable[[], None]) -> Failures:
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
    """Each bucket in memory of this host that the servers map: POSIX shared memory, on CUDA its IPC handles."""

    in_session, broken = True, False

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.buffers: Buffers | None = None

    async def begin(self, servers: list[Server], version: int, deadline: Deadline) -> Failures:
        self.buffers = self.buffers or Buffers(self._shared)
        return {}

    def pack(self, named: Named) -> Packed:
        assert self.buffers, "begin() comes first"
        return self.buffers.pack(named)

    async def send(self, servers: list[Server], packed: Packed, update: Update, deadline: Deadline) -> Failures:
        async def ask(server: Server) -> None:
            payload = [_pickled(packed.named) for _ in range(server.tp)]  # CUDA counts who opens which handle
            body = {"serialized_named_tensors": payload, **update.body()}
            await load(server, "/update_weights_from_tensor", body, deadline)

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
    """Shared memory is passed on as a name. torch's default, open files, kills a process that is not our child."""
    before = torch.multiprocessing.get_sharing_strategy()
    torch.multiprocessing.set_sharing_strategy("file_system")
    try:
        yield
    finally:
        torch.multiprocessing.set_sharing_strategy(before)


class _Handle:
    """A tensor that pickles as torch hands it to other processes, but with a GPU's own name: numbers differ there."""

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
