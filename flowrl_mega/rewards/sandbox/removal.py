"""Removes a program's folder, however deep it is and whatever its modes forbid. stdlib only."""

from __future__ import annotations

import contextlib
import os
import secrets


def remove(top: str) -> None:
    """When no process of the program is left. Folders are moved to the top before they are read: no path gets too long,
    and nothing is called once a level. What cannot be removed stays, as nobody could do more."""
    left = [top] if _is_folder(top) else []
    while left:
        path = left.pop()
        with contextlib.suppress(OSError):
            os.chmod(path, 0o700)
            for entry in list(os.scandir(path)):
                with contextlib.suppress(OSError):
                    left += _take(entry, top)
            if path != top:
                os.rmdir(path)
    with contextlib.suppress(OSError):
        os.rmdir(top)


def _is_folder(top: str) -> bool:
    """Not a link that the program has put in its place: that alone goes, and what it points to stays."""
    with contextlib.suppress(OSError):
        os.unlink(top)
    return os.path.isdir(top)


def _take(entry: os.DirEntry[str], top: str) -> list[str]:
    """Removes a file; gives the new place of a folder."""
    if not entry.is_dir(follow_symlinks=False):
        os.unlink(entry.path)
        return []
    place = f"{top}/{secrets.token_hex(8)}"
    os.chmod(entry.path, 0o700)  # who may not write in it may not move it
    os.rename(entry.path, place)
    return [place]
