"""The answers of an evaluation on disk: each is written when it is complete, and never again.

RUN_DIR/answers/ has a file of JSON lines for each process that writes, so that none waits for another and a kill loses
at most the line being written. RUN_DIR/eval.json says what they are answers of.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NamedTuple

from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.config import ConfigError, RunError
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.whole_file import write_whole

FOLDER, ABOUT = "answers", "eval.json"
SAMPLED = 1 << 16  # bytes of a file of weights that are read at its start, its middle and its end


class Place(NamedTuple):
    """The attempt-th answer to a benchmark's problem, both from 0."""

    benchmark: str
    problem: int
    attempt: int


class Answer(NamedTuple):
    text: str
    tokens: int | None  # None: the server did not say
    finish: Literal["stop", "length"]
    nats: float | None = None  # -log pi of the whole answer at its temperature; None: greedy, or the server did not say


def read_answers(run_dir: Path) -> dict[Place, Answer]:
    """All that there is. A last line without an end, which a kill has cut, is left out; ConfigError for any other that
    is no answer."""
    found: dict[Place, Answer] = {}
    for file in sorted((run_dir / FOLDER).glob("*.jsonl")):
        lines = file.read_bytes().split(b"\n")[:-1]
        for number, line in enumerate(lines, start=1):
            try:
                row = json.loads(line)
                place = Place(row["benchmark"], row["problem"], row["attempt"])
                found.setdefault(place, Answer(row["text"], row["tokens"], row["finish"], row.get("nats")))
            except (ValueError, KeyError, TypeError):
                raise ConfigError(f"{file}, line {number}: is no answer of an evaluation; remove the line") from None
    return found


class AnswerFile:
    """Appends answers, for any thread: one write a line. `writer` names the process: its rank."""

    def __init__(self, run_dir: Path, writer: int) -> None:
        (run_dir / FOLDER).mkdir(parents=True, exist_ok=True)
        self.path = run_dir / FOLDER / f"rank_{writer}.jsonl"
        self._file = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o644)
        os.ftruncate(self._file, self.path.read_bytes().rfind(b"\n") + 1)  # without a line that a kill has cut

    def add(self, place: Place, answer: Answer) -> None:
        line = json.dumps(place._asdict() | answer._asdict(), ensure_ascii=False, allow_nan=False)
        whole = line.encode("utf-8", "replace") + b"\n"  # half a surrogate pair, which is no UTF-8, becomes "?"
        try:
            if os.write(self._file, whole) != len(whole):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError as error:
            raise RunError(
                f"{self.path}: cannot be written ({error.strerror}); all answers before this one are kept: make room "
                "and give the same command again"
            ) from None

    def close(self) -> None:
        os.close(self._file)


def about(config: EvalConfig, every: list[Problems]) -> dict[str, Any]:
    """What decides the text of an answer. `benchmarks` may grow, and with it the number of problems and attempts."""
    rollout, path = config.rollout, config.model.path
    sampling = {name: getattr(rollout, name) for name in ("engine", "max_tokens", "temperature", "top_p", "top_k")}
    return {
        "rollout": sampling,
        "seed": config.seed,
        "chat_template": config.chat_template,
        "template_date": str(config.template_date),
        "model": {"path": path, "name": config.model.name, "weights": weights_of(path) if path else None},
        "benchmarks": {problems.name: problems.sum for problems in every},
    }


def check_about(run_dir: Path, now: dict[str, Any]) -> None:
    """Refuses a folder with answers of other settings, of another model or of other problems; else notes them. What
    `now` leaves out is not compared, and stays as it was."""
    file = run_dir / ABOUT
    if file.exists():
        try:
            before = json.loads(file.read_text())
        except ValueError:
            raise ConfigError(f"{file}: not valid JSON; choose another run_dir") from None
        benchmarks = before.get("benchmarks", {})
        for name, was, is_now in _differences(before, now):
            raise ConfigError(
                f"{name} = {is_now!r}: run_dir = {str(run_dir)!r} holds answers with {was!r}; choose another run_dir, "
                "or the same settings"
            )
        now = before | now | {"benchmarks": benchmarks | now["benchmarks"]}
    run_dir.mkdir(parents=True, exist_ok=True)
    write_whole(file, json.dumps(now, indent=1) + "\n")


def _differences(before: Mapping[str, Any], now: Mapping[str, Any], place: str = "") -> Iterator[tuple[str, Any, Any]]:
    for name, value in now.items():
        was = before.get(name)
        if isinstance(value, Mapping) and isinstance(was, Mapping):
            yield from _differences(was, value, f"{place}{name}.")
        elif was != value and not (place == "benchmarks." and name not in before):
            yield f"{place}{name}", was, value


def weights_of(path: str) -> str:
    """Tells model folders apart by names, sizes and samples of their files: the same one elsewhere is the same."""
    said = hashlib.sha256()
    root = Path(path)
    for file in sorted(file for file in root.rglob("*") if file.is_file()):
        size = file.stat().st_size
        said.update(f"{file.relative_to(root)} {size}\n".encode())
        with file.open("rb") as stream:
            for at in (0, size // 2, max(0, size - SAMPLED)):
                stream.seek(at)
                said.update(stream.read(SAMPLED))
    return said.hexdigest()[:16]
