"""The run folder: config.yaml, metrics.jsonl, evaluation.jsonl and distributions.jsonl (one object a step),
samples.jsonl (one a sample), run.json (one a start)."""

from __future__ import annotations

import contextlib
import json
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.metric_names import renamed
from flowrl_mega.whole_file import write_whole

CONFIG, METRICS, EVALUATION, SAMPLES = "config.yaml", "metrics.jsonl", "evaluation.jsonl", "samples.jsonl"
DISTRIBUTIONS, STARTS = "distributions.jsonl", "run.json"


class RunFolder:
    """Writes a run's records, each flushed as it comes, so that a kill loses at most the line being written.

    Numbers are written so that they read back as the very same floats. NaN and infinities, which JSON lacks, become
    null: the files stay readable by every tool, and equal runs compare equal.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(
                f"run_dir = {self.path}: cannot be made ({error.strerror}); choose a folder that can be written"
            ) from None

    def write_config(self, config: Mapping[str, Any], resume_step: int = 0) -> None:
        """Writes config.yaml. Another one, of the steps until `resume_step`, is kept as config.until_step_N.yaml."""
        path, text = self.path / CONFIG, yaml.safe_dump(dict(config), sort_keys=False)
        kept = self.path / f"config.until_step_{resume_step}.yaml"
        if resume_step and path.is_file() and path.read_text() != text and not kept.exists():
            os.replace(path, kept)
        write_whole(path, text)

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._append(METRICS, [{"step": step, **metrics}])

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        self._append(EVALUATION, [{"step": step, **metrics}])

    def samples(self, step: int, rows: Sequence[Mapping[str, Any]]) -> None:
        self._append(SAMPLES, [{"step": step, **row} for row in rows])

    def distributions(self, step: int, record: Mapping[str, Any]) -> None:
        self._append(DISTRIBUTIONS, [{"step": step, **record}])

    def started(self, start: Mapping[str, Any]) -> None:
        """Adds to run.json what this start runs on and with; one that cannot be read begins anew."""
        path, starts = self.path / STARTS, []
        if path.is_file():
            with contextlib.suppress(ValueError, KeyError, TypeError):
                starts = [*json.loads(path.read_text())["starts"]]
        write_whole(path, json.dumps({"starts": [*starts, dict(start)]}, indent=1) + "\n")

    def close(self) -> None:
        """Nothing is held open between steps."""

    def read(self, name: str) -> list[dict[str, Any]]:
        """The complete records of one file, in order; none if it does not exist yet.

        Metrics that an earlier version wrote under old names come under the new ones (metric_names.py).
        """
        path = self.path / name
        records = _parse(path, path.read_text(encoding="utf-8")) if path.exists() else []
        return [renamed(record) for record in records] if name == METRICS else records

    def truncate(self, step: int) -> None:
        """Drops every record of a later step, and a last line that a killed run left half-written.

        Old names of metrics are replaced, so that in a run that goes on each metric has one name.
        """
        for name in (METRICS, EVALUATION, SAMPLES, DISTRIBUTIONS):
            kept = [record for record in self.read(name) if record["step"] <= step]
            if (self.path / name).exists():
                write_whole(self.path / name, _lines(kept))

    def _append(self, name: str, records: Iterable[Mapping[str, Any]]) -> None:
        with open(self.path / name, "a", encoding="utf-8") as file:
            file.write(_lines(records))


def _lines(records: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(_plain(record), ensure_ascii=False, allow_nan=False) + "\n" for record in records)


def _plain(value: Any) -> Any:
    """`value` in JSON's own types; arrays and tensors (any `tolist`) become numbers or lists."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else None
    return value if isinstance(value, (str, int)) or value is None else str(value)


def _parse(path: Path, text: str) -> list[dict[str, Any]]:
    lines = text.split("\n")
    records = []
    for number, line in enumerate(lines, start=1):
        try:
            records.extend([json.loads(line)] if line else [])
        except json.JSONDecodeError:
            if number < len(lines):  # a half-written record is the last and has no line end
                raise ConfigError(
                    f"{path}, line {number}: not valid JSON; remove this line, or the whole file"
                ) from None
    return records
