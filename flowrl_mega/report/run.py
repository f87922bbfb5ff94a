"""A folder of a run, of an evaluation or of a study, as far as the page shows it."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.metric_names import renamed
from flowrl_mega.monitor.run_folder import CONFIG, EVALUATION, METRICS, SAMPLES
from flowrl_mega.report.distributions import Distributions, read_distributions
from flowrl_mega.report.records import Columns, Reader
from flowrl_mega.report.text import cut

STARTS, DISTRIBUTIONS, SCORES, STUDY = "run.json", "distributions.jsonl", "scores.json", "report.json"
FILES = (CONFIG, METRICS, EVALUATION, SAMPLES, STARTS, DISTRIBUTIONS, SCORES, STUDY)
NEEDED = (METRICS, EVALUATION, CONFIG, SCORES, STUDY)  # one of them makes a folder worth a page
MOST_BYTES = 16 << 20  # of distributions.jsonl, parsed in a fraction of a second
MOST_TEXT = 4000  # characters of an answer


class Sample(NamedTuple):
    step: int | None  # None: of an evaluation
    prompt: str
    response: str
    left_out: int  # characters of the response
    reward: Any
    right: Any
    kind: str
    reason: str


@dataclass
class Run:
    path: Path
    settings: dict[str, Any]  # by dotted name
    metrics: Columns
    evaluation: Columns
    distributions: Distributions
    samples: list[Sample]
    starts: list[dict[str, Any]]  # run.json
    scores: dict[str, Any] | None  # scores.json
    study: dict[str, Any] | None  # report.json
    notes: list[str]

    @property
    def has_trained(self) -> bool:
        return bool(len(self.metrics.steps) or len(self.evaluation.steps))

    @property
    def hours(self) -> float:
        return float(np.sum(self.metrics.known("perf/step_seconds"))) / 3600

    @property
    def gpu_hours(self) -> float | None:
        """Each start's hours times its GPUs; None where the GPUs are not known."""
        seconds = self.metrics.values.get("perf/step_seconds")
        known = [(start.get("step"), start.get("gpus")) for start in self.starts]
        if seconds is None or not known or not all(type(part) is int for pair in known for part in pair):
            return None
        first = np.array([step for step, _ in known])
        gpus = np.array([count for _, count in known])
        # The start of a step is the last one that came after fewer steps; the first one has what is before it, too.
        start = np.maximum(np.searchsorted(first, self.metrics.steps, side="left") - 1, 0)
        return float(np.nansum(seconds * gpus[start])) / 3600


def has_anything(path: Path) -> bool:
    """Whether a page could be made of the folder."""
    return any((path / name).is_file() for name in NEEDED)


def check_folders(paths: Iterable[Path]) -> None:
    """ConfigError where a folder holds nothing that a page could be made of."""
    for path in paths:
        if not path.is_dir():
            raise ConfigError(f"{path}: no such folder; give the run_dir of a run, an evaluation or a study")
        if not has_anything(path):
            raise ConfigError(
                f"{path}: no run, as it has none of {', '.join(NEEDED)}; give the run_dir of a run, an evaluation or "
                "a study"
            )


def read_run(path: Path, most_samples: int) -> Run:
    reader = Reader(path)
    scores, study = reader.whole(SCORES), reader.whole(STUDY)
    if study is not None and not isinstance(study.get("rows"), dict):
        study = None  # another tool's report.json
    is_run = reader.has(METRICS) or not (scores or study)
    run_only = Reader(path) if not is_run else reader  # an evaluation is not to be told what a run would have
    return Run(
        path=path,
        settings=run_only.settings(CONFIG),
        metrics=Columns([renamed(record) for record in run_only.records(METRICS)]),
        evaluation=Columns(list(run_only.records(EVALUATION))),
        distributions=read_distributions(run_only.records(DISTRIBUTIONS, MOST_BYTES)),
        samples=[_sample(row) for row in run_only.last_records(SAMPLES, most_samples)],
        starts=_starts(reader.whole(STARTS)),
        scores=scores if scores and isinstance(scores.get("benchmarks"), dict) else None,
        study=study,
        notes=reader.notes,
    )


def _starts(record: dict[str, Any] | None) -> list[dict[str, Any]]:
    starts = (record or {}).get("starts")
    return [start for start in starts if isinstance(start, dict)] if isinstance(starts, list) else []


def _sample(row: dict[str, Any]) -> Sample:
    """A row that a run wrote, or one of an evaluation, which names its fields otherwise."""
    of_eval = "benchmark" in row
    prompt = f"{row['benchmark']}, problem {row.get('problem')}" if of_eval else str(row.get("prompt", ""))
    response, left_out = cut(str(row.get("text" if of_eval else "response", "")), MOST_TEXT)
    return Sample(
        step=row["step"] if type(row.get("step")) is int else None,
        prompt=cut(prompt, MOST_TEXT)[0],
        response=response,
        left_out=left_out,
        reward=row.get("score" if of_eval else "reward"),
        right=row.get("right"),
        kind=str(row.get("kind", ""))[:100],
        reason=str(row.get("why" if of_eval else "reason", ""))[:MOST_TEXT],
    )
