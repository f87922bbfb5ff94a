"""The benchmarks, one entry each, and how their problems are read: from a file, from the hub, or made on the spot."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowrl_mega.benchmark import codeforces
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare.problem import BROKEN, BadRow, Problem
from flowrl_mega.data.prepare.reasoning_gym import make_rows
from flowrl_mega.data.prepare.recipes import RECIPES
from flowrl_mega.data.prepare.sources import records
from flowrl_mega.data.prompts import Row, read_jsonl

MADE, MADE_ROWS = "reasoning_gym:", 100


class Benchmark(NamedTuple):
    """A published benchmark. `sum`: the `digest` of its problems; None: the file could not be had where this was
    written."""

    title: str
    recipe: str  # its columns, its prompt and its grader: data/prepare/recipes.py
    dataset: str  # id[:configuration] on the hub
    split: str = "test"
    rows: int | None = None
    sum: str | None = None
    keep: Callable[[dict[str, Any]], bool] = lambda record: True


def _of_v5(record: dict[str, Any]) -> bool:
    """LiveCodeBench's v5 as DeepCoder and FlowRL take it: contests from 2024-08-01 to 2025-02-01."""
    return "2024-08-01" <= str(record.get("contest_date", "2024-08-01"))[:10] < "2025-02-01"


BENCHMARKS = {
    "aime24": Benchmark("AIME 2024", "aime24", "math-ai/aime24", rows=30, sum="48bf158fe41a8bdc"),
    "aime25": Benchmark("AIME 2025", "aime25", "math-ai/aime25", rows=30, sum="ffd2d926dbdb6ce5"),
    "amc23": Benchmark("AMC 2023", "amc23", "math-ai/amc23", rows=40, sum="d440c6d0cfd8a8e0"),
    "math500": Benchmark("MATH-500", "math500", "HuggingFaceH4/MATH-500", rows=500, sum="9f5e2675fcef5e04"),
    "minerva": Benchmark("Minerva", "minerva", "math-ai/minervamath", rows=272),
    "olympiadbench": Benchmark(
        "OlympiadBench",
        "olympiadbench",
        "Hothan/OlympiadBench:OE_TO_maths_en_COMP",
        "train",
        rows=675,
        sum="118691ac28cb3056",
    ),
    "gsm8k": Benchmark("GSM8K", "gsm8k", "openai/gsm8k:main", rows=1319, sum="53d5e7a9cdcc16c9"),
    "humaneval": Benchmark("HumanEval", "humaneval", "openai/openai_humaneval", rows=164, sum="57118bec1dfd5578"),
    "humaneval+": Benchmark("HumanEval+", "humaneval+", "evalplus/humanevalplus", rows=164),
    "livecodebench": Benchmark(
        "LiveCodeBench v5", "livecodebench", "livecodebench/code_generation_lite:release_v5", keep=_of_v5
    ),
}


def load(
    names: Sequence[str], data: str | None, first: int | None, seed: int, setting: str = "benchmarks"
) -> list[Problems]:
    """The problems of these benchmarks, of each the `first` so many. `data`: the folder of their files; None: the hub.
    `seed`: of those that are made. Raises ConfigError naming benchmark and file; `setting` is where they are named."""
    try:
        found = [_load(name, data, first, seed) for name in names]
    except ConfigError as error:
        raise ConfigError(f"{setting}: {error}") from None
    known = [problems.name for problems in found]
    if twice := [name for name in known if known.count(name) > 1]:
        raise ConfigError(f"{setting}: two are called {twice[0]!r}; rename one of the files")
    return found


def _load(name: str, data: str | None, first: int | None, seed: int) -> Problems:
    if name.startswith(MADE):
        made = make_rows(name.removeprefix(MADE), first or MADE_ROWS, seed)
        return _own(name, [row | {"kind": "reasoning_gym"} for row in made], f"reasoning-gym, seed {seed}", first)
    if name == codeforces.NAME:
        folder = Path(data or ".", name)
        if not (data and folder.is_dir()):
            raise ConfigError(f"{name}: no hub has it in this form; give data, a folder with {name}/ in it")
        problems = codeforces.read_problems(folder)
        return Problems(name, "CodeForces", [p.row for p in problems[:first]], str(folder), digest(problems), False)
    if name not in BENCHMARKS:
        if not Path(name).is_file():
            near = difflib.get_close_matches(name.lower(), BENCHMARKS, n=1, cutoff=0.5)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"there are: {', '.join(BENCHMARKS)}, {codeforces.NAME}, {MADE}TASK"
            )
            raise ConfigError(f"{name!r} is neither a known benchmark nor a file; {hint}")
        return _own(Path(name).stem, read_jsonl(name), name, first)
    benchmark = BENCHMARKS[name]
    file = _file(name, data) if data else None
    problems = _published(benchmark, str(file)) if file else _of_hub(name, benchmark)
    found, known = digest(problems), benchmark.sum
    if file and (benchmark.rows not in (None, len(problems)) or known not in (None, found)):
        raise ConfigError(
            f"{file} is not {benchmark.title} as published: {len(problems)} problems with the sum "
            f"{found}, where {benchmark.rows} with the sum {known or '(not known)'} are expected; "
            f"take the file of {benchmark.dataset}, or name this one as your own (benchmarks=[FILE])"
        )
    rows = [problem.row for problem in problems[:first]]
    return Problems(name, benchmark.title, rows, str(file or f"{benchmark.dataset} on the hub"), found, found == known)


def _own(name: str, rows: list[Row], source: str, first: int | None) -> Problems:
    """Problems that nobody has published: each row is asked and graded as it is."""
    found = digest([Problem(str(row["prompt"]), row) for row in rows])
    return Problems(name, name, rows[:first], source, found, False)


def _of_hub(name: str, benchmark: Benchmark) -> list[Problem]:
    try:
        return _published(benchmark, benchmark.dataset)
    except ConfigError as error:
        why = re.search(r"cannot be loaded \((.*?)\); check", str(error))
        reason = (
            f"{benchmark.dataset}: cannot be loaded from the hub ({why[1]})"
            if why
            else str(error).removeprefix("--input ")
        )
        raise ConfigError(f"{reason}; give data, a folder with {name}.jsonl in it") from None


def _file(name: str, folder: str) -> Path:
    """NAME.jsonl or .parquet, or as data sets with several splits are named NAME_test.jsonl."""
    for stem in (name, f"{name}_test"):
        for file in (Path(folder, f"{stem}.jsonl"), Path(folder, f"{stem}.parquet")):
            if file.is_file():
                return file
    raise ConfigError(
        f"data = {folder!r} has no {name}.jsonl for benchmark {name}; put the published records there, one a line, or "
        "leave data out where the hub can be reached"
    )


def _published(benchmark: Benchmark, name: str) -> list[Problem]:
    """The problems in a file, or in a data set of the hub."""
    make, wording = RECIPES[benchmark.recipe].make, RECIPES[benchmark.recipe].wording
    problems = []
    for record in records([name], benchmark.split):
        try:
            if record.value is None:
                raise BadRow(BROKEN, record.fault)
            if benchmark.keep(record.value):
                problems.append(make(record.value, wording))
        except BadRow as fault:
            raise ConfigError(
                f"{name}, record {record.row}: {fault}; a benchmark is taken whole or not at all"
            ) from None
    if not problems:
        raise ConfigError(f"{name} holds no problems; give the published file")
    return problems


def digest(problems: list[Problem]) -> str:
    """The first 16 digits of the SHA-256 of the problems' texts and what grades their answers: the same for
    every form of the file, and for every wording of the prompt around a text."""
    said = hashlib.sha256()
    for problem in problems:
        graded = {key: value for key, value in problem.row.items() if key != "prompt"}
        said.update(json.dumps([problem.text, graded], sort_keys=True, default=str).encode() + b"\n")
    return said.hexdigest()[:16]
