"""Reads published records one by one, each with file and row: JSON lines, Parquet files, Hugging Face datasets."""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowrl_mega.config import ConfigError

JSON_LINES = (".jsonl", ".json", ".ndjson")  # a file may have any name; a name like these is of no data set
SHOWN = 200  # characters of a refused record


class Record(NamedTuple):
    """`value` is None where the record could not be read, and `fault` says why."""

    file: str
    row: int  # from 1; of JSON lines the line
    value: dict[str, Any] | None
    fault: str
    begins: str
    folder: Path | None  # of a local file


def records(inputs: list[str], split: str) -> Iterator[Record]:
    """All records of the inputs in order. ConfigError for an input that cannot be opened."""
    for name in inputs:
        path = Path(name)
        if path.suffix == ".parquet":
            yield from _dataset(name, {"path": "parquet", "data_files": name, "split": "train"}, path.parent)
        elif path.is_dir():
            yield from _dataset(name, {"path": name, "split": split}, path)
        elif path.is_file() or path.suffix in JSON_LINES:
            yield from _json_lines(path)
        else:
            dataset, _, config = name.partition(":")
            yield from _dataset(name, {"path": dataset, "name": config or None, "split": split}, None)


def _json_lines(path: Path) -> Iterator[Record]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
            for number, line in enumerate(file, start=1):
                line = line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line
                if not line.strip():
                    continue
                value, fault = _parsed(line)
                begins = line[: 4 * SHOWN].decode("utf-8", "replace").rstrip("\n")[:SHOWN]
                yield Record(path.name, number, value, fault, begins, path.parent)
    except (OSError, EOFError) as error:  # gzip raises both, and without strerror, for a file that is damaged
        reason = getattr(error, "strerror", None) or error
        raise ConfigError(
            f"--input {path}: cannot be read ({reason}); give a file of JSON lines, a .parquet file, a folder "
            "or the id of a Hugging Face dataset"
        ) from None


def _parsed(line: bytes) -> tuple[dict[str, Any] | None, str]:
    """(the object, "") or (None, what is wrong and the fix)."""
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return None, "is not UTF-8; convert the file"
    except json.JSONDecodeError as error:
        return None, f"is not JSON ({error.msg} at column {error.colno}); write one object a line"
    except (ValueError, RecursionError):  # an integer of thousands of digits; thousands of brackets
        return None, "holds a number or a nesting too large to read; remove the row"
    if not isinstance(value, dict):
        return None, f"is a {type(value).__name__}; write one object a line"
    return value, ""


def _dataset(name: str, where: dict[str, Any], folder: Path | None) -> Iterator[Record]:
    """Records read by the library `datasets`, as a stream: its cache would hold everything a second time."""
    try:
        import datasets
    except ImportError:
        raise ConfigError(
            f"--input {name}: Parquet files and Hugging Face datasets are read by the library datasets, which is not "
            "installed; fix: pip install flowrl-mega[data], or give JSON lines"
        ) from None
    try:
        if where["path"] == "parquet" and not _rows_of_parquet(name):
            return  # which datasets trips over
        dataset = datasets.load_dataset(**where, streaming=True)
        short = [column for column, feature in (dataset.features or {}).items() if _is_short_float(feature)]
        stream = enumerate(dataset, start=1)
    except Exception as error:  # of the library, of the hub's client, of the network: of many classes
        raise ConfigError(_unreadable(name, folder, error)) from None
    while True:
        try:
            number, value = next(stream)
        except StopIteration:
            return
        except Exception as error:
            raise ConfigError(_unreadable(name, folder, error)) from None
        value |= {column: _shortest(value[column]) for column in short}
        begins = ", ".join(f"{key}: {str(cell)[:SHOWN]}" for key, cell in value.items())
        yield Record(Path(name).name if folder else name, number, value, "", begins[:SHOWN], folder)


def _rows_of_parquet(path: str) -> int:
    import pyarrow.parquet

    return pyarrow.parquet.read_metadata(path).num_rows


def _is_short_float(feature: Any) -> bool:
    return getattr(feature, "dtype", None) in ("float16", "float32")


def _shortest(cell: Any) -> Any:
    """A float of 32 or 16 bits as it is written: 0.1, which as one of 64 bits would be 0.10000000149011612."""
    return float(str(np.float32(cell))) if isinstance(cell, float) else cell


def _unreadable(name: str, folder: Path | None, error: Exception) -> str:
    reason = f"{type(error).__name__}: {str(error).strip()}".split("\n")[0]
    if folder:
        return f"--input {name}: cannot be read ({reason}); is it there, and is its --split right?"
    return (
        f"--input {name}: no such file, and as the id of a Hugging Face dataset it cannot be loaded ({reason}); check "
        "the id and --split, or download its files where the hub can be reached and give their paths"
    )
