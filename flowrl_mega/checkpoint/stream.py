"""Megatron's `torch_dist` format written and read tensor by tensor, so that no model has to fit into memory.

Megatron's own save wants a built model. This writes the same files through torch.distributed.checkpoint: chunks of
global tensors (`decoder.layers.mlp.linear_fc2.weight` is one tensor over all layers), and a pickled `.metadata` that
says where each chunk lies. Megatron's load then reads them at any tensor- and pipeline-parallel size.
"""

from __future__ import annotations

import io
import os
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import LoadPlan, SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult

from flowrl_mega.config import ConfigError


class Chunk(NamedTuple):
    """A rectangle of a checkpoint tensor, and how to get it when its turn comes."""

    key: str
    offset: tuple[int, ...]
    shape: tuple[int, ...]
    total_shape: tuple[int, ...]  # of the whole checkpoint tensor
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def bytes(self) -> int:
        return self.dtype.itemsize * torch.Size(self.shape).numel()


def write(folder: Path, chunks: Sequence[Chunk], objects: dict[str, Any], done: Callable[[int], None]) -> None:
    """Write this rank's chunks, and its objects by key, into the empty `folder`; `done` hears the bytes. Collective."""
    planner = _Planner(chunks, objects, done)
    with _without_checksums(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        dcp.save({}, storage_writer=_Writer(folder), planner=planner, no_dist=not dist.is_initialized())
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_config(CheckpointingConfig("torch_dist"), str(folder))


@contextmanager
def _without_checksums() -> Iterator[None]:
    """Checksums take five times as long as the writing, and torch.load never looks at them."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)


class _Planner(dcp.DefaultSavePlanner):
    """Gives the writer each chunk when it is to be written, not before."""

    def __init__(self, chunks: Sequence[Chunk], objects: dict[str, Any], done: Callable[[int], None]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.chunks = {MetadataIndex(chunk.key, torch.Size(chunk.offset)): chunk for chunk in chunks}
        self.objects, self.done = objects, done

    def create_local_plan(self) -> SavePlan:
        items = [WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO) for key in self.objects]
        for index, chunk in self.chunks.items():
            place = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
            data = TensorWriteData(place, TensorProperties(chunk.dtype), torch.Size(chunk.total_shape))
            items.append(WriteItem(index, WriteItemType.SHARD, tensor_data=data))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, item: WriteItem) -> Tensor | io.BytesIO:
        if item.type == WriteItemType.BYTE_IO:
            buffer = io.BytesIO()
            torch.save([self.objects[item.index.fqn]], buffer)  # Megatron's way: a list of one
            return buffer
        chunk = self.chunks[item.index]
        self.done(chunk.bytes)
        return chunk.read().contiguous().view(chunk.shape)


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which keeps a reference to the last tensor of each key until the end; this keeps none."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        name, results = f"{plan.storage_data.prefix}0.distcp", []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                start, data = file.tell(), planner.resolve_data(item)
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    torch.save(data, file)
                size = file.tell() - start
                results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
            file.flush()
            os.fsync(file.fileno())
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future


def extra_state_key(module: str, layer: int, layers: int) -> str:
    """Every linear layer of Megatron has an extra state, FP8's scales; a load asks for it even where it is empty."""
    return ShardedObject(f"decoder.layers.{module}._extra_state", None, (layers,), (layer,)).unique_key


COMMON_KEY = ShardedObject("common_state", None, (1,), (0,)).unique_key


class Reader:
    """The tensors of a `torch_dist` checkpoint, whatever layout saved it. Needs no process group."""

    def __init__(self, folder: Path) -> None:
        try:
            self._reader = dcp.FileSystemReader(folder)
            self._metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(self._metadata, is_coordinator=True)
        except Exception as error:  # of a pickle, any
            raise ConfigError(f"{folder}: its .metadata cannot be read ({error!r}); not a whole checkpoint") from None
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, found in self._metadata.state_dict_metadata.items():
            if isinstance(found, dcp.metadata.TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(found.size), found.properties.dtype

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The rectangle at `offset` of the tensor `key`."""
        metadata: Any = self._metadata.state_dict_metadata[key]
        chunk = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        target = torch.empty(shape, dtype=self.dtypes[key])
        items = create_read_items_for_chunk_list(key, metadata, [chunk])
        try:
            self._reader.read_data(LoadPlan(items), _Into(target))
        except (OSError, RuntimeError, KeyError, EOFError) as error:
            first_line = str(error).split("\n")[0]
            raise ConfigError(f"{self.folder}: {key} cannot be read ({first_line}); the checkpoint is broken") from None
        read = sum(torch.Size(item.lengths).numel() for item in items)
        if read != target.numel():
            raise ConfigError(f"{self.folder}: {key} is not whole; the checkpoint is broken")
        return target


class _Into(dcp.DefaultLoadPlanner):
    """Puts what is read where it belongs in one tensor."""

    def __init__(self, target: Tensor) -> None:
        super().__init__()
        self.target = target

    def resolve_tensor(self, item: Any) -> Tensor:
        into = self.target
        for axis, (start, length) in enumerate(zip(item.dest_offsets, item.lengths, strict=True)):
            into = into.narrow(axis, start, length)
        return into

    def commit_tensor(self, item: Any, tensor: Tensor) -> None:
        """Nothing is left to do."""
