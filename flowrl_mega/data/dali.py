"""The loader dali: NVIDIA DALI's webdataset reader, which reads ahead in threads of its own and decodes images.

IndexLoader has the order of MmapLoader: DALI's reader takes prompts as its index file lists them, so that file is
written in the order wanted, a stretch of the stream at a time. ReaderLoader leaves the order to DALI: it reads
sequentially, each shard its part of the store, through a shuffle buffer, and after each epoch the shards move on to the
next part. Both want their prompts in a store.
"""

from __future__ import annotations

import base64
import hashlib
import os
import tempfile
from abc import ABC, abstractmethod
from collections import deque
from importlib import metadata
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch

from flowrl_mega.config import ConfigError, DaliSettings
from flowrl_mega.data.dali_records import COMPONENTS, Records, records_of
from flowrl_mega.data.loader import Subset, taken
from flowrl_mega.data.order import index_at
from flowrl_mega.data.prompts import Prompt, Prompts
from flowrl_mega.data.store import MappedStore, StoredPrompt

BATCH = 64  # prompts that DALI reads at a time, and two such batches ahead
IMAGE_BATCH = 8  # with images, which take megabytes each
STRETCH = 1 << 14  # most prompts in an index file of IndexLoader


class DaliLoader(ABC):
    """Base of both: prompts are handed out of batches that DALI reads ahead.

    `prompts` must be a store, or a Subset of one; ConfigError otherwise, and where DALI cannot be imported.
    """

    def __init__(self, prompts: Prompts, settings: DaliSettings, seed: int, shard: int = 0, shards: int = 1) -> None:
        assert 0 <= shard < shards
        import_dali()
        self.store, self.indices = _stored(prompts)
        self.seed, self.shard, self.shards = seed, shard, shards
        self.records = records_of(self.store)
        self.device = _device(settings, self.store.has_images)
        self._reader: _Reader | None = None
        self._ready: deque[Prompt] = deque()
        self.taken = 0  # prompts of this shard that `next` has returned

    def next(self, n: int) -> list[Prompt]:
        prompts = []
        for _ in range(n):
            if not self._ready:
                self._ready.extend(self._batch())
            prompts.append(self._ready.popleft())
            self.taken += 1
        return prompts

    @abstractmethod
    def _batch(self) -> list[Prompt]:
        """The shard's next prompts, at least one."""

    @abstractmethod
    def state_dict(self) -> dict[str, Any]: ...

    @abstractmethod
    def load_state_dict(self, state: dict[str, Any]) -> None: ...

    def close(self) -> None:
        self._reader = None  # DALI's threads end with it
        self._ready.clear()

    def _open(self, indices: np.ndarray, checkpoint: bytes | None = None, **reading: Any) -> _Reader:
        return _Reader(self.store, self.records, indices, self.device, checkpoint, **reading)


class IndexLoader(DaliLoader):
    """data.dali.shuffle = index: the same prompts and the same state as MmapLoader."""

    _left = 0  # prompts of the current index file that are not read yet

    def _batch(self) -> list[Prompt]:
        if self._reader is None or not self._left:
            self._left = min(STRETCH, max(1024, len(self.indices)))
            first = self.shard + self.shards * self.taken
            stream = range(first, first + self.shards * self._left, self.shards)
            order = [index_at(position, self.seed, len(self.indices)) for position in stream]
            self._reader = self._open(self.indices[order])
        batch = self._reader.batch()[: self._left]  # beyond its end the reader begins again
        self._left -= len(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        return {"taken": self.taken}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.close()
        self.taken = taken(state)


class ReaderLoader(DaliLoader):
    """data.dali.shuffle = reader: DALI's own order. The state is a DALI checkpoint, for this shard and store only."""

    def __init__(self, prompts: Prompts, settings: DaliSettings, seed: int, shard: int = 0, shards: int = 1) -> None:
        super().__init__(prompts, settings, seed, shard, shards)
        if len(self.indices) < shards:
            raise ConfigError(
                f"data.dali.shuffle = reader: {len(self.indices)} prompts are too few for {shards} data-parallel "
                "ranks; set data.dali.shuffle=index"
            )
        self.reading = {
            "random_shuffle": True,
            "initial_fill": settings.buffer,
            "seed": seed,
            "shard_id": shard,
            "num_shards": shards,
            "stick_to_shard": False,
        }
        chosen = hashlib.sha256(self.indices.tobytes()).hexdigest()[:16]
        self.identity = {  # everything that DALI's checkpoint depends on
            "store": f"{self.records.key}/{chosen}",
            "shard": shard,
            "shards": shards,
            "seed": seed,
            "buffer": settings.buffer,
            "batch": _batch_size(self.store),
            "dali": import_dali().__version__,
        }
        self._before: bytes | None = None  # DALI's checkpoint before the batch that prompts are handed out of
        self._batch_size = 0

    def _batch(self) -> list[Prompt]:
        if self._reader is None:
            self._reader = self._open(self.indices, self._before, **self.reading)
        else:
            self._before = self._reader.checkpoint()
        batch = self._reader.batch()
        self._batch_size = len(batch)
        return batch

    def state_dict(self) -> dict[str, Any]:
        checkpoint = None if self._before is None else base64.b64encode(self._before).decode()
        handed_out = self._batch_size - len(self._ready)
        return {**self.identity, "taken": self.taken, "checkpoint": checkpoint, "handed_out": handed_out}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for name, mine in self.identity.items():
            if state.get(name) != mine:
                raise ConfigError(
                    f"data.dali.shuffle = reader: the state to resume from is of {name} {state.get(name, 'unknown')}, "
                    f"and this run's is {mine}; only the same can go on exactly: set it back, or start a new run"
                )
        self.close()
        self._before = None if state["checkpoint"] is None else base64.b64decode(state["checkpoint"])
        self._batch_size = 0
        self.next(state["handed_out"])
        self.taken = state["taken"]


class _Reader:
    """A DALI pipeline: endless batches of the prompts `indices`, in that order unless `reading` shuffles them."""

    def __init__(
        self,
        store: MappedStore,
        records: Records,
        indices: np.ndarray,
        device: int | None,
        checkpoint: bytes | None,
        **reading: Any,
    ) -> None:
        dali = import_dali()
        self.store = store
        images = store.has_images
        self.pipe = dali.Pipeline(
            batch_size=_batch_size(store),
            num_threads=min(4, len(os.sched_getaffinity(0))) if images else 1,
            device_id=device,
            prefetch_queue_depth=2,
            enable_checkpointing=bool(reading),
            checkpoint=checkpoint,
        )
        with tempfile.TemporaryDirectory(prefix="flowrl-mega-") as folder:  # build() reads the index file whole
            index = Path(folder) / "index"
            records.write_index(index, indices)
            with self.pipe:
                parts = dali.fn.readers.webdataset(
                    paths=str(records.tar),
                    index_paths=str(index),
                    ext=list(COMPONENTS if images else COMPONENTS[:1]),
                    dtypes=[dali.types.INT32, dali.types.UINT8] if images else [dali.types.INT32],
                    **reading,
                )
                if images:
                    ids, encoded = parts
                    where = "cpu" if device is None else "mixed"
                    parts = ids, dali.fn.decoders.image(encoded, device=where, output_type=dali.types.RGB)
                self.pipe.set_outputs(*(parts if images else [parts]))
            self.pipe.build()

    def batch(self) -> list[Prompt]:
        try:
            parts = [part.as_cpu() for part in self.pipe.run()]
        except RuntimeError as error:
            raise ConfigError(
                f"data.loader = dali: {self.store.path} cannot be read or one of its images not decoded; loader mmap "
                f"would name the prompt. DALI says: {str(error).strip()}"
            ) from None
        return [self._prompt(*map(np.asarray, sample)) for sample in zip(*parts, strict=True)]

    def _prompt(self, numbers: np.ndarray, image: np.ndarray | None = None) -> Prompt:
        index, has_image, *token_ids = numbers.tolist()
        # A view would keep the whole batch in memory, where DALI does not write the next one over it.
        pixels = image.copy() if image is not None and has_image else None
        return StoredPrompt(index, token_ids, self.store.row_bytes(index), pixels, str(self.store.path))

    def checkpoint(self) -> bytes:
        """DALI state that resumes with the batch after the last one returned."""
        return self.pipe.checkpoint()


def import_dali() -> ModuleType:
    """The module nvidia.dali; ConfigError where it is not installed, or another package of that name is."""
    try:
        import nvidia.dali.fn
        import nvidia.dali.types

        nvidia.dali.fn.readers.webdataset  # noqa: B018  a package of that name may have none
        return nvidia.dali
    except (ImportError, AttributeError) as error:
        why = str(error)
    if _installed("nvidia-dali"):
        raise ConfigError(
            "data.loader = dali: PyPI's package nvidia-dali is a placeholder, not NVIDIA DALI; "
            "pip uninstall nvidia-dali, then pip install flowrl-mega[dali]"
        )
    raise ConfigError(f"data.loader = dali: NVIDIA DALI cannot be imported ({why}); pip install flowrl-mega[dali]")


def _installed(distribution: str) -> bool:
    try:
        metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return False
    return True


def _stored(prompts: Prompts) -> tuple[MappedStore, np.ndarray]:
    """(the store, [prompts] int64 indices into it)."""
    store = prompts.prompts if isinstance(prompts, Subset) else prompts
    if not isinstance(store, MappedStore):
        raise ConfigError(
            "data.loader = dali: reads prompt stores only; make one with tools/prepare_data.py, or set data.loader=mmap"
        )
    return store, prompts.indices if isinstance(prompts, Subset) else np.arange(len(store))


def _device(settings: DaliSettings, images: bool) -> int | None:
    """The GPU that decodes images; None if the CPU does, or if there are no images."""
    if settings.device == "gpu" and not torch.cuda.is_available():
        raise ConfigError("data.dali.device = gpu: this machine has no GPU that torch can use; set auto or cpu")
    if not images or settings.device == "cpu" or not torch.cuda.is_available():
        return None
    return torch.cuda.current_device()


def _batch_size(store: MappedStore) -> int:
    return IMAGE_BATCH if store.has_images else BATCH
