"""Where a conversion writes to: checked before, removed when it fails, with one clear message for a disk that fails."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from torch.distributed.checkpoint.api import CheckpointException

from flowrl_mega.checkpoint.folder import new_folder
from flowrl_mega.config import ConfigError
from flowrl_mega.parallel.layout import raise_on_all_ranks, rank


def check_target(out: Path, needed: int) -> None:
    """Refuse what exists, and a disk that cannot hold it, before a byte is written."""
    with _disk(out):
        if out.exists() or out.is_symlink():
            raise ConfigError(f"--out = {str(out)!r}: exists already; remove it or choose another")
        folder = out.absolute().parent
        while not (folder.exists() or folder.is_symlink()):
            folder = folder.parent
        if not folder.is_dir() or out.name == "..":
            raise ConfigError(f"--out = {str(out)!r}: {folder} is no folder; choose another")
        if not os.access(folder, os.W_OK | os.X_OK):
            raise ConfigError(f"--out = {str(out)!r}: {folder} cannot be written to; choose another")
        free = shutil.disk_usage(folder).free
        if free < needed:
            raise ConfigError(
                f"--out = {str(out)!r}: needs {needed / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left; "
                "free some or choose another disk"
            )


@contextmanager
def written(out: Path) -> Iterator[Path]:
    """`new_folder`; where it fails, the folders on the way to it go as well. Collective."""
    made = [folder for folder in out.absolute().parents if not folder.exists()]
    try:
        with _disk(out), new_folder(out) as folder, raise_on_all_ranks(), _disk(out):
            yield folder
    except BaseException:
        for folder in made if rank() == 0 else []:
            with suppress(OSError):
                folder.rmdir()
        raise


@contextmanager
def _disk(out: Path) -> Iterator[None]:
    """A disk that fails as one clear message."""
    try:
        yield
    except CheckpointException as error:  # torch's, around what a rank met while it wrote
        known = (ConfigError, OSError, KeyboardInterrupt, SystemExit)
        cause = next((e for e, _ in error.failures.values() if isinstance(e, known)), error)
        raise (_as_config_error(cause, out) if isinstance(cause, OSError) else cause) from None
    except OSError as error:
        raise _as_config_error(error, out) from None


def _as_config_error(error: OSError, out: Path) -> ConfigError:
    reason = f"{error.strerror}: {error.filename}" if error.filename else error.strerror
    return ConfigError(f"--out = {str(out)!r}: cannot be written ({reason}); choose another place")
