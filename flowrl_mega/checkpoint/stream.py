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
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import SavePlan, TensorWriteData, WriteItem, WriteItemType
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
from torch.distributed.checkpoint.storage import WriteResult
from torch.distributed.checkpoint.utils import _create_file_view

from flowrl_mega.config import ConfigError
from flowrl_mega.model.hf_folder import write_in_pieces
from flowrl_mega.parallel.layout import rank


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
    if rank() == 0:
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
            rectangle = ChunkStorageMetadata(torch.Size(chunk.offset), torch.Size(chunk.shape))
            data = TensorWriteData(rectangle, TensorProperties(chunk.dtype), torch.Size(chunk.total_shape))
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


ALIGN = 64  # bytes: torch.save aligns a tensor in its archive, so it is aligned in the file when the archive is


class _Writer(dcp.FileSystemWriter):
    """torch's writer, which keeps a reference to the last tensor of each key until the end; this keeps none."""

    def write_data(self, plan: SavePlan, planner: Any) -> Any:
        name, results = f"{plan.storage_data.prefix}0.distcp", []
        with open(Path(self.path) / name, "wb") as file:
            for item in plan.items:
                data = planner.resolve_data(item)
                file.write(bytes(-file.tell() % ALIGN))
                start = file.tell()
                if isinstance(data, io.BytesIO):
                    file.write(data.getbuffer())
                else:
                    _save(data, file)
                size = file.tell() - start
                results.append(WriteResult(item.index, size, _StorageInfo(name, start, size)))
            file.flush()
            os.fsync(file.fileno())
        future: torch.futures.Future[list[WriteResult]] = torch.futures.Future()
        future.set_result(results)
        return future


class _InPieces(io.RawIOBase):
    """The file that torch.save sees."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file

    def write(self, data: Any) -> int:
        write_in_pieces(self.file, memoryview(data))
        return len(data)


def _save(data: Tensor, file: BinaryIO) -> None:
    pieces: Any = _InPieces(file)
    try:
        torch.save(data, pieces)
    except RuntimeError as error:  # its archive is not whole, says torch, and hides why: a full disk, or a signal
        raise (error.__context__ or error) from None


def object_key(key: str, index: int = 0, of: int = 1) -> str:
    """Where Megatron looks for an object that is no tensor, one of `of` under the same key."""
    return ShardedObject(key, None, (of,), (index,)).unique_key


AGAIN = "the checkpoint is broken, make or copy it again"


class Reader:
    """The tensors of a `torch_dist` checkpoint, whatever layout saved it. Needs no process group."""

    def __init__(self, folder: Path) -> None:
        try:
            self._metadata: Any = dcp.FileSystemReader(folder).read_metadata()
        except Exception as error:  # of a pickle, any
            raise ConfigError(f"{folder / '.metadata'}: cannot be read ({error!r}); {AGAIN}") from None
        self.folder, self._fake = folder, FakeTensorMode()
        self._check_files()
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        for key, found in self._metadata.state_dict_metadata.items():
            if isinstance(found, dcp.metadata.TensorStorageMetadata):
                self.shapes[key], self.dtypes[key] = tuple(found.size), found.properties.dtype

    def _check_files(self) -> None:
        """All that `.metadata` speaks of; of a file that is cut off torch says, and late, that an archive is broken."""
        ends: dict[str, int] = {}
        for stored in self._metadata.storage_data.values():
            ends[stored.relative_path] = max(ends.get(stored.relative_path, 0), stored.offset + stored.length)
        for name, end in sorted(ends.items()):
            file = self.folder / name
            if not file.is_file():
                raise ConfigError(f"{file}: is missing; {AGAIN}")
            if (size := file.stat().st_size) < end:
                raise ConfigError(f"{file}: is cut off, {size} bytes of {end}; {AGAIN}")

    def read(self, key: str, offset: tuple[int, ...], shape: tuple[int, ...]) -> Tensor:
        """The rectangle at `offset` of the tensor `key`: mapped from its file where one chunk holds all of it."""
        metadata = self._metadata.state_dict_metadata[key]
        wanted = ChunkStorageMetadata(torch.Size(offset), torch.Size(shape))
        items = create_read_items_for_chunk_list(key, metadata, [wanted])
        if sum(item.lengths.numel() for item in items) != wanted.sizes.numel():
            raise ConfigError(f"{self.folder}: {key!r} is not whole; {AGAIN}")
        try:
            parts = [_narrow(self._chunk(item.storage_index), item.storage_offsets, item.lengths) for item in items]
        except Exception as error:  # of broken bytes, any
            reason = str(error).split("\n")[0].split(". ")[0]
            raise ConfigError(f"{self.folder}: {key!r} cannot be read ({reason}); {AGAIN}") from None
        if len(parts) == 1:
            return parts[0]
        target = torch.empty(shape, dtype=self.dtypes[key])
        for item, part in zip(items, parts, strict=True):
            _narrow(target, item.dest_offsets, item.lengths).copy_(part)
        return target

    def _chunk(self, index: MetadataIndex) -> Tensor:
        """A chunk as its file holds it. torch.load would read it into memory; under fake tensors it only says where."""
        stored = self._metadata.storage_data[index]
        with open(self.folder / stored.relative_path, "rb") as file, self._fake:
            archive: Any = _create_file_view(file, stored.offset, stored.length)
            told = torch.load(archive, weights_only=True)
        storage = told.untyped_storage()
        mapped = np.memmap(file.name, np.uint8, "c", stored.offset + storage._checkpoint_offset, (storage.nbytes(),))
        return torch.from_numpy(mapped).view(told.dtype).as_strided(told.shape, told.stride(), told.storage_offset())


def _narrow(tensor: Tensor, offsets: torch.Size, lengths: torch.Size) -> Tensor:
    for axis, (start, length) in enumerate(zip(offsets, lengths, strict=True)):
        tensor = tensor.narrow(axis, start, length)
    return tensor
