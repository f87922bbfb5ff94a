"""Reads a run's files as far as they can be read, and notes what cannot.

Unlike RunFolder.read, which protects a run that goes on, nothing here is an error: a page of the rest is worth having.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from numpy.typing import NDArray

from flowrl_mega.settings import flat

Floats = NDArray[np.float64]
BLOCK = 1 << 20
MOST_FROM_END = 32 << 20  # bytes looked at for the last records


class Reader:
    """The files of one folder. `notes` has a sentence for each that is missing, or of which something is left out."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.notes = folder, list[str]()

    def has(self, name: str) -> bool:
        return (self.folder / name).is_file()

    def records(self, name: str, most_bytes: int | None = None) -> Iterator[dict[str, Any]]:
        """The objects of a file of JSON lines, in order. Of one that is larger than `most_bytes` only every nth line
        is parsed."""
        path = self.folder / name
        if not self.has(name):
            self.notes.append(f"{name} is not there.")
            return
        every = -(-path.stat().st_size // most_bytes) if most_bytes else 1
        if every > 1:
            self.notes.append(f"{name} is large: one line in {every} is read.")
        bad: list[int] = []
        try:
            for place, line in _every(path, every):
                record = _parsed(line)
                if record is not None:
                    yield record
                elif line.strip():
                    bad.append(place + 1)
                    half = not line.endswith(b"\n")
        except OSError as error:
            self.notes.append(f"{name} cannot be read ({error.strerror}).")
        if bad and half:
            self.notes.append(f"{name}: the last line is half written and left out.")
            bad.pop()
        if bad:
            self.notes.append(f"{name}: lines that are no record are left out: {len(bad)}, the first is line {bad[0]}.")

    def last_records(self, name: str, count: int) -> list[dict[str, Any]]:
        """The last `count` objects of a file of JSON lines, in order; fewer where they are very long."""
        path, found = self.folder / name, list[dict[str, Any]]()
        if not self.has(name):
            self.notes.append(f"{name} is not there.")
            return found
        try:
            for line in _lines_backward(path):
                record = _parsed(line)
                found += [record] if record is not None else []
                if len(found) == count:
                    break
        except OSError as error:
            self.notes.append(f"{name} cannot be read ({error.strerror}).")
        return found[::-1]

    def whole(self, name: str) -> dict[str, Any] | None:
        """The object of a JSON file; None where it has none."""
        if not self.has(name):
            return None
        try:
            record = _parsed((self.folder / name).read_bytes())
        except OSError:
            record = None
        if record is None:
            self.notes.append(f"{name} cannot be read: it is no JSON object.")
        return record

    def settings(self, name: str) -> dict[str, Any]:
        """The settings of a YAML file by their dotted names."""
        if not self.has(name):
            self.notes.append(f"{name} is not there: the settings are not known.")
            return {}
        try:
            tree = yaml.load((self.folder / name).read_text(encoding="utf-8", errors="replace"), _Loader)
        except (OSError, yaml.YAMLError, ValueError, RecursionError):
            tree = None
        if not isinstance(tree, dict):
            self.notes.append(f"{name} cannot be read: the settings are not known.")
            return {}
        return flat(tree)


class Columns:
    """Records of steps, turned into one array a metric: NaN where a step has none. `nulls`: the steps at which a
    metric was written as null, or is no number at all."""

    def __init__(self, records: list[dict[str, Any]]) -> None:
        kept = [record for record in records if type(record.get("step")) is int and abs(record["step"]) < 2**53]
        self.steps: Floats = np.array([record["step"] for record in kept], dtype=np.float64)
        self.values, self.nulls = dict[str, Floats](), dict[str, list[int]]()
        for name in dict.fromkeys(name for record in kept for name in record if name != "step"):
            column = _floats([record.get(name) for record in kept])
            missing = np.flatnonzero(np.isnan(column))
            if nulls := [kept[place]["step"] for place in missing if name in kept[place]]:
                self.nulls[name] = nulls
            if len(missing) < len(column):
                self.values[name] = column

    def known(self, name: str) -> Floats:
        """The numbers of a metric, in order, without the steps that have none."""
        values = self.values.get(name, np.empty(0))
        return values[~np.isnan(values)]


def numbers(value: Any) -> Floats:
    """A list of numbers as an array, NaN for what is none; empty where `value` is no list."""
    return _floats(value) if isinstance(value, list) else np.empty(0)


def _floats(values: list[Any]) -> Floats:
    try:
        column = np.array(values, dtype=np.float64)  # None becomes NaN
    except (ValueError, TypeError, OverflowError):
        column = np.array([_float(value) for value in values], dtype=np.float64)
    if column.ndim != 1:  # lists in a list
        column = np.full(len(values), np.nan)
    column[~np.isfinite(column)] = np.nan
    return column


def _float(value: Any) -> float:
    try:
        return float(value) if isinstance(value, int | float) else float("nan")
    except OverflowError:
        return float("nan")


def _every(path: Path, every: int) -> Iterator[tuple[int, bytes]]:
    """Every nth line, from the first, and the last one, with their places."""
    with open(path, "rb") as file:
        for place, line in enumerate(file):
            skipped = bool(place % every)
            if not skipped:
                yield place, line
        if every > 1 and skipped:
            yield place, line


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        record = json.loads(line.decode("utf-8", errors="replace"))
    except (ValueError, RecursionError):
        return None
    return record if isinstance(record, dict) else None


def _lines_backward(path: Path) -> Iterator[bytes]:
    """The lines of a file from its end, without reading what nobody asks for; not those beyond MOST_FROM_END."""
    with open(path, "rb") as file:
        start = end = file.seek(0, 2)
        pieces: list[bytes] = []  # of a line whose start has not come yet, the last one first
        while start > max(0, end - MOST_FROM_END):
            size = min(BLOCK, start)
            start = file.seek(start - size)
            first, *others = file.read(size).split(b"\n")
            if others:
                yield others.pop() + b"".join(reversed(pieces))
                yield from reversed(others)
                pieces = []
            pieces.append(first)
        if start == 0:
            yield b"".join(reversed(pieces))


_Loader: Any = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
