"""What a study needs of the hub, fetched once on a machine with a network; all later stages work without."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from flowrl_mega.benchmark import codeforces
from flowrl_mega.benchmark.table import BENCHMARKS, load
from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare.sources import records
from flowrl_mega.reproduce.study import Model
from flowrl_mega.whole_file import write_whole

FILES = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]  # of a model; not its weights in other forms


def fetch_model(model: Model, folder: Path, noted: Path) -> None:
    """A model folder of the hub. The commit is noted in `noted`, and is the one that is fetched there from then on."""
    from huggingface_hub import HfApi, snapshot_download

    known = json.loads(noted.read_text()) if noted.is_file() else {}
    try:
        commit = known.get(model.hub) or HfApi().model_info(str(model.hub), revision=model.revision).sha
        _write(noted, json.dumps(known | {str(model.hub): commit}, indent=1) + "\n")
        part = folder.with_suffix(".part")
        snapshot_download(str(model.hub), revision=commit, local_dir=part, allow_patterns=FILES)
    except Exception as error:  # of the hub's client and of the network: of many classes
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:300]
        raise ConfigError(
            f"{model.hub}: cannot be fetched from the hub ({reason}); fetch on a machine with a network, or put the "
            f"model's folder at {folder}"
        ) from None
    part.replace(folder)


def fetch_dataset(name: str, split: str, file: Path) -> None:
    """The records of a data set of the hub, or of a file, as JSON lines."""
    rows = []
    for record in records([name], split):
        if record.value is None:
            raise ConfigError(f"{name}, record {record.row}: {record.fault}")
        rows.append(json.dumps(record.value, ensure_ascii=False, default=_plain))
    _write(file, "".join(row + "\n" for row in rows))


def fetch_benchmark(name: str, data: str | None, file: Path) -> None:
    """A benchmark's file, from the folder `data` or the hub, looked at before it is taken."""
    if data is None:
        fetch_dataset(BENCHMARKS[name].dataset, BENCHMARKS[name].split, file)
        return
    (problems,) = load([name], data, None, 0)
    fetch_dataset(problems.source, BENCHMARKS[name].split, file)  # also of a Parquet file JSON lines


def fetch_contests(data: str | None, folder: Path) -> None:
    """The contests of CodeForces, which no hub has in this form, from the folder `data`."""
    if data is None or not Path(data, codeforces.NAME).is_dir():
        raise ConfigError(f"codeforces: no hub has its contests in this form; put them at {folder}")
    codeforces.read_problems(Path(data, codeforces.NAME))
    part = folder.with_suffix(".part")
    shutil.copytree(Path(data, codeforces.NAME), part, dirs_exist_ok=True)
    part.replace(folder)


def _write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    write_whole(file, text)


def _plain(value: Any) -> Any:
    return value.isoformat() if hasattr(value, "isoformat") else str(value)
