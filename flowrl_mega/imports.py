"""Loading a user's own object by name, so that a reward, objective, engine or task needs no fork of this package."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
import traceback
import zlib
from pathlib import Path
from types import ModuleType
from typing import Any

from flowrl_mega.config import ConfigError


def load(spec: str, field: str) -> Any:
    """The object that `spec`, the value of the setting `field`, names: "module:name" or "path/to/file.py:name".

    Modules in the current directory are found too. A file is imported once per process. Raises ConfigError that names
    the setting, the value, what cannot be imported and why, and the nearest name.
    """
    return load_with_module(spec, field)[0]


def load_with_module(spec: str, field: str) -> tuple[Any, ModuleType]:
    """As `load`, with the module that was named: what stands beside the object may describe it."""
    source, colon, name = spec.rpartition(":")
    if not (colon and source and name):
        raise ConfigError(f"{field} = {spec!r}: must be module:name or path/to/file.py:name")
    is_file = source.endswith(".py")
    try:
        module = _import_file(Path(source)) if is_file else _import_module(source)
    except Exception as error:
        fix = "give the path of a Python file that can be imported"
        if not is_file:
            fix = "give the name of an installed module, of one in the current directory, or the path of a .py file"
        reason = traceback.format_exception_only(error)[-1].strip()
        raise ConfigError(f"{field} = {spec!r}: cannot import {source!r} ({reason}); {fix}") from error
    try:
        return getattr(module, name), module
    except AttributeError:
        place = getattr(module, "__file__", None) or source
        raise ConfigError(f"{field} = {spec!r}: {place} has no {name!r}; {_known(module, name)}") from None


def _import_module(name: str) -> ModuleType:
    _append_path(Path.cwd())
    return importlib.import_module(name)


def _import_file(path: Path) -> ModuleType:
    path = path.resolve(strict=True)
    name = f"file_{path.stem}_{zlib.crc32(bytes(path)):08x}"  # files of the same name in two folders are two modules
    if name in sys.modules:
        return sys.modules[name]
    found = importlib.util.spec_from_file_location(name, path)
    assert found and found.loader, "a .py file always has a loader"
    _append_path(path.parent)  # so that the file can import its neighbours
    module = importlib.util.module_from_spec(found)
    sys.modules[name] = module  # dataclasses and pickle look a class's module up here
    try:
        found.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _append_path(folder: Path) -> None:
    """Last on the path: a user's file must not shadow a library."""
    if str(folder) not in sys.path:
        sys.path.append(str(folder))


def _known(module: ModuleType, name: str) -> str:
    """The nearest public function or class of the module, or all of those that it defines itself."""
    public = {key: value for key, value in vars(module).items() if callable(value) and not key.startswith("_")}
    near = difflib.get_close_matches(name, public, n=1, cutoff=0.5)
    own = [key for key, value in public.items() if inspect.getmodule(value) is module]
    return f"did you mean {near[0]!r}?" if near else f"it has: {', '.join(own) or 'none'}"
