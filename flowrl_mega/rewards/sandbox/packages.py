"""Modules of the trainer's environment that programs may import, shown to them one by one. stdlib only.

All of site-packages would show programs whatever is installed there, and slow each of them down by what `site` reads.
"""

from __future__ import annotations

import importlib.util
import os
import sys
from collections.abc import Iterable, Sequence
from importlib.machinery import ModuleSpec, PathFinder


def find(names: Iterable[str]) -> list[str]:
    """The files and folders of these modules in this environment: each module's own comes first, then its libraries'.

    Raises ModuleNotFoundError with the name of one that is not installed. Built-in modules need none.
    """
    paths = []
    for name in names:
        spec = importlib.util.find_spec(name) if name.isidentifier() else None
        if spec is None:
            raise ModuleNotFoundError(name)
        own = next(iter(spec.submodule_search_locations or ()), spec.origin if spec.has_location else None)
        if own:
            libraries = os.path.join(os.path.dirname(own), f"{name}.libs")  # where wheels keep shared ones
            paths += [own, *([libraries] if os.path.isdir(libraries) else [])]
    return paths


class Finder:
    """Imports the modules that it has folders of, and no others that lie beside them."""

    def __init__(self) -> None:
        self.folders: dict[str, str] = {}  # by the module's name

    def find_spec(self, name: str, path: Sequence[str] | None = None, target: object = None) -> ModuleSpec | None:
        folder = self.folders.get(name)
        return PathFinder.find_spec(name, [folder]) if folder else None


finder = Finder()


def allow(paths: Iterable[str]) -> None:
    """From here on this interpreter imports the modules at these paths."""
    finder.folders = {os.path.basename(path).partition(".")[0]: os.path.dirname(path) for path in paths}
    sys.meta_path.append(finder)


def found_in(folder: str) -> None:
    """They lie there now, side by side: the root has changed."""
    finder.folders = dict.fromkeys(finder.folders, folder)
