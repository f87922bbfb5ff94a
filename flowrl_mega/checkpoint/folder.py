"""Folders that are there whole or not at all; and those of a run: which there are, which are whole, which may go."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from flowrl_mega.config import ConfigError
from flowrl_mega.parallel.layout import rank

_STEP = re.compile(r"step_(\d+)")


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """A folder under a temporary name beside `final`. It gets that name when the block ends, and goes when it fails.

    Collective: rank 0 makes, renames and removes it; its OSError is every rank's.
    """
    partial = final.with_name(f".{final.name}.partial")  # a name like .git or .cache may be somebody's
    try:
        _by_first(lambda: _make(partial))
        yield partial
        if dist.is_initialized():
            dist.barrier()
        _by_first(lambda: _finish(partial, final))
    except BaseException:
        if rank() == 0:
            shutil.rmtree(partial, ignore_errors=True)
        raise


def _by_first(act: Callable[[], None]) -> None:
    """Rank 0 does it while the others wait, and where it fails, all fail."""
    fault: list[OSError | None] = [None]
    if rank() == 0:
        try:
            act()
        except OSError as error:
            fault = [error]
    if dist.is_initialized():
        dist.broadcast_object_list(fault, src=0)
    if fault[0]:
        raise fault[0]


def _make(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # of one that was killed
    folder.mkdir(parents=True)


def _finish(partial: Path, final: Path) -> None:
    _flush(partial)
    os.rename(partial, final)
    sync(final.parent)


def _flush(folder: Path) -> None:
    """Bytes on disk before the name says that they are."""
    for path in (*folder.rglob("*"), folder):
        sync(path)


def sync(path: Path) -> None:
    """Return when this file's bytes, or this folder's names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def is_megatron(path: str | Path) -> bool:
    """Whether `path` is a Megatron checkpoint rather than a Hugging Face folder."""
    return (Path(path) / ".metadata").is_file()


def step_of(path: Path) -> int:
    match = _STEP.fullmatch(path.name)
    assert match, f"{path} is not a checkpoint folder"
    return int(match[1])


def checkpoints(run_dir: Path) -> list[Path]:
    """Finished checkpoints, oldest first. An interrupted save has another name and is never among them."""
    folders = [p for p in (run_dir / "checkpoints").glob("step_*") if _STEP.fullmatch(p.name)]
    return sorted(folders, key=step_of)


def find_checkpoint(run_dir: Path, resume: str) -> Path | None:
    """What `--resume` means: "never" nothing, "auto" the newest checkpoint if there is one, else that folder."""
    if resume == "never":
        return None
    if resume == "auto":
        return next(reversed(checkpoints(run_dir)), None)
    path = Path(resume)
    if not path.is_dir() or not _STEP.fullmatch(path.name):
        raise ConfigError(f"--resume {resume}: not a checkpoint folder (.../checkpoints/step_N); or say auto or never")
    return path


def verify_checkpoint(path: Path, part: int = 0, parts: int = 1) -> None:
    """Refuse a checkpoint with a missing or changed file, by the SHA-256 list that Megatron wrote when saving.

    Of several ranks, each reads its own `part` of the files.
    """
    fix = f"remove {path} to resume from an older one"
    try:
        files: dict[str, str] = json.loads((path / "integrity.json").read_text())["files"]
        names = sorted(files)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ConfigError(f"{path}: broken checkpoint, integrity.json cannot be read ({error!r}); {fix}") from None
    if not isinstance(files, dict) or "metadata.json" not in names:
        raise ConfigError(f"{path}: broken checkpoint, integrity.json lists no files; {fix}")
    for name in names[part::parts]:
        try:
            with open(path / name, "rb") as file:
                found = hashlib.file_digest(file, "sha256").hexdigest()
        except OSError:
            raise ConfigError(f"{path}: broken checkpoint, {name} is missing; {fix}") from None
        if found != files[name]:
            raise ConfigError(f"{path}: broken checkpoint, {name} has changed since it was saved; {fix}")


def remove_unfinished(run_dir: Path) -> None:
    """Clear away what interrupted saves and removals left."""
    for path in (run_dir / "checkpoints").glob(".step_*"):
        shutil.rmtree(path)


def remove_old(run_dir: Path, keep_last: int) -> None:
    """Keep the newest, and what is write-protected. One that is half removed has lost its name, so that nobody takes it
    for a checkpoint."""
    for path in checkpoints(run_dir)[:-keep_last]:
        if os.access(path, os.W_OK):
            shutil.rmtree(path.rename(path.with_name(f".{path.name}")))
