"""One process at a time, over all processes of a host and, where the file system has locks, of several hosts.

Only the standard library is imported: setup.py compiles csrc with ops/build.py before anything is installed.
"""

from __future__ import annotations

import errno
import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, made if it is missing; waits for whoever holds it.

    The kernel releases it when the process ends, however it ends. Some cluster file systems have no locks: the block
    then runs unlocked, so what it writes must appear in one step (os.replace) and be the same from every process.
    """
    with path.open("w") as file:
        wait_for(file)
        yield


def wait_for(file: IO[str]) -> None:
    """Lock an open file until it is closed; waits for whoever holds it, and does nothing where there are no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        if error.errno not in (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP):
            raise
