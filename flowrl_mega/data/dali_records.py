"""Copies a store's prompts into a webdataset for DALI, which cannot read the store's own files: their prompts do not
begin at multiples of 512 bytes.

    records.tar   <i>.ids: int32 [i, whether it has an image, token ids...]; <i>.image: the image as it is encoded
    places.npy    [prompts, components, 2] int64: offset and size in bytes of each component in records.tar

The files are written once, into the store's folder or, where that is read-only, into the user's cache, in a folder
named by a hash of the store's contents. One process per host writes them and the others wait.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import uuid
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np

from flowrl_mega.config import ConfigError
from flowrl_mega.data.store import MappedStore
from flowrl_mega.file_lock import locked

FORMAT = 1
COMPONENTS = ("ids", "image")
# A PNG of one pixel stands where a prompt has no image: DALI decodes one for every prompt of a batch.
NO_IMAGE = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010802000000907753de0000000c49444154789c63606060000000040001f61738550000"
    "000049454e44ae426082"
)


class Records(NamedTuple):
    key: str  # hash of the store's contents
    tar: Path
    spans: np.ndarray  # [prompts, components, 2] int64: offset and size in bytes

    def write_index(self, path: Path, indices: np.ndarray) -> None:
        """Write the index file that makes DALI read the prompts `indices` in this order; repeats are allowed."""
        spans = self.spans[indices].reshape(len(indices), -1)
        line = " ".join(f"{name} %d %d" for name in COMPONENTS[: self.spans.shape[1]])
        lines = "\n".join(map(line.__mod__, map(tuple, spans.tolist())))
        path.write_text(f"v1.1 {len(indices)}\n{lines}\n")


def records_of(store: MappedStore) -> Records:
    """The store's records, written if they do not exist. ConfigError if nowhere is writable, or if they are damaged."""
    key = _key(store)
    homes = [store.path, *_cache()]
    folders = [home / f"dali-{key}" for home in homes]
    found = next((folder for folder in folders if folder.is_dir()), None)
    if found is None:
        found = next((folder for folder in folders if _writable(folder.parent)), None)
        if found is None:
            raise ConfigError(
                f"data.loader = dali: its records cannot be written to {' or '.join(map(str, homes))}; make one "
                "writable, or set data.loader=mmap"
            )
        with locked(found.parent / ".dali.lock"):
            if not found.is_dir():  # another process may have written them while this one waited
                _write(store, found)
    return _open(found, key)


def _key(store: MappedStore) -> str:
    holds = json.dumps([FORMAT, store.header["files"]], sort_keys=True)
    return hashlib.sha256(holds.encode()).hexdigest()[:16]


def _cache() -> list[Path]:
    try:
        return [Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowrl-mega"]
    except RuntimeError:  # no home
        return []


def _writable(folder: Path) -> bool:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return False
    return os.access(folder, os.W_OK)


def _write(store: MappedStore, folder: Path) -> None:
    partial = folder.with_name(f".{folder.name}.{uuid.uuid4().hex}.partial")
    try:
        partial.mkdir()
        with (partial / "records.tar").open("wb") as file:
            spans = [_add_prompt(file, store, i) for i in range(len(store))]
            file.write(bytes(2 * tarfile.BLOCKSIZE))
            file.flush()
            os.fsync(file.fileno())
        np.save(partial / "places.npy", np.array(spans, np.int64))
        try:
            partial.rename(folder)
        except OSError:
            if not folder.is_dir():
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _add_prompt(file: BinaryIO, store: MappedStore, i: int) -> list[tuple[int, int]]:
    image = store.image_bytes(i)
    ids = np.concatenate([[i, bool(image)], store.tokens(i)]).astype("<i4").tobytes()
    parts = (ids, image or NO_IMAGE) if store.has_images else (ids,)
    return [_add(file, f"{i:09d}.{name}", part) for name, part in zip(COMPONENTS, parts, strict=False)]


def _add(file: BinaryIO, name: str, data: bytes) -> tuple[int, int]:
    """Append `data` to the tar file as a file named `name`; returns (offset, size) of its bytes."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    file.write(info.tobuf(tarfile.USTAR_FORMAT))
    offset = file.tell()
    file.write(data + bytes(-len(data) % tarfile.BLOCKSIZE))
    return offset, len(data)


def _open(folder: Path, key: str) -> Records:
    tar = folder / "records.tar"
    try:
        spans = np.load(folder / "places.npy", mmap_mode="r")
        offset, size = spans[-1, -1].tolist()
        whole = tar.stat().st_size == offset + size + -size % tarfile.BLOCKSIZE + 2 * tarfile.BLOCKSIZE
    except (OSError, ValueError, IndexError):
        whole = False
    if not whole:
        raise ConfigError(f"{folder}: these records of loader dali are damaged; remove the folder, they are made again")
    return Records(key, tar, spans)
