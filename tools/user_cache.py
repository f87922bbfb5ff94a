"""Folders in the user's cache that all of their clones share, made by whoever comes first. Standard library only."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

from setup import SetupError


def cache() -> Path:
    try:
        folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "flowrl-mega"
        folder.mkdir(parents=True, exist_ok=True)
    except (OSError, RuntimeError) as error:
        raise SetupError(f"no folder for it: {error}; XDG_CACHE_HOME names another cache folder") from None
    return folder


def key(*parts: str) -> str:
    """Of all that decides what is in a folder."""
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


@contextlib.contextmanager
def locked(path: Path, what: str) -> Iterator[None]:
    """One set-up at a time, for all clones."""
    with path.open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            print(f"waiting for another set-up of {what} ...", flush=True)
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def link(path: Path, folder: Path) -> None:
    """Point the clone's `path` at it, in one step."""
    if path.exists() and not path.is_symlink():
        raise SetupError(f"{path} is a folder of its own, not a link; move it away")
    new = path.with_name(f"{path.name}.{os.getpid()}")
    new.symlink_to(folder)
    os.replace(new, path)
