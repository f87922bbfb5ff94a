"""Whether two runs, or two trees of runs, logged the same numbers to the last digit.

    python tools/compare_runs.py OLD NEW [--added NAME ...]

Compares metrics.jsonl, evaluation.jsonl and samples.jsonl of run folders, matched by their path in OLD and NEW. Names
of metrics that have changed since count as their new names; seconds, rates and memory are left out. Prints a line for
each run folder and the first differences; exit code 0: all equal, 1: some differ, 2: there is nothing to compare.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.metric_names import is_measured
from flowrl_mega.monitor.run_folder import EVALUATION, METRICS, SAMPLES, RunFolder

SHOWN = 10  # differences of a run folder that are printed


class Value(NamedTuple):
    """One number or text of a run."""

    place: str  # "metrics.jsonl, line 3, loss/policy"
    text: str  # as JSON, which keeps every digit


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path, help="a run folder, or a folder of run folders")
    parser.add_argument("new", type=Path, help="the same of the other version")
    parser.add_argument("--added", nargs="+", default=[], metavar="NAME", help="names that only NEW's version logs")
    return parser


def main(arguments: list[str] | None = None) -> int:
    options = parser().parse_args(arguments)
    old, new = run_folders(options.old), run_folders(options.new)
    if not old:
        print(f"{options.old}: no run folder (one with {METRICS} or {EVALUATION})", file=sys.stderr)
        return 2
    total, all_equal = 0, True
    for name in sorted(old.keys() | new.keys()):
        if name not in old or name not in new:
            all_equal = False
            print(f"{name}: only in {options.old if name in old else options.new}")
            continue
        try:
            compared, differing = compare(old[name], new[name], set(options.added))
        except ConfigError as error:
            print(error, file=sys.stderr)
            return 2
        total += compared
        all_equal = all_equal and not differing
        print(f"{name}: {compared:,} values, " + (f"{len(differing):,} differ" if differing else "equal"))
        for line in differing[:SHOWN]:
            print(f"    {line}")
    print(f"{total:,} values compared: {'equal' if all_equal else 'NOT equal'}")
    return 0 if all_equal else 1


def run_folders(root: Path) -> dict[str, Path]:
    """The run folders at or below `root`, by relative path ("." for `root` itself)."""
    found = {path.parent for name in (METRICS, EVALUATION) for path in root.rglob(name)}
    return {folder.relative_to(root).as_posix(): folder for folder in found}


def compare(old: Path, new: Path, added: set[str]) -> tuple[int, list[str]]:
    """How many values two run folders have, and a line for each that differs or that only one of them has.

    What only the new run has under one of the names `added` counts for nothing.
    """
    ours, theirs = dict(values(old)), dict(values(new))
    theirs = {place: text for place, text in theirs.items() if place in ours or place.split(", ")[-1] not in added}
    differing = []
    for place in dict.fromkeys([*ours, *theirs]):
        if place not in theirs:
            differing.append(f"{place}: missing in the new run")
        elif place not in ours:
            differing.append(f"{place}: missing in the old run")
        elif ours[place] != theirs[place]:
            differing.append(f"{place}: {ours[place]} -> {theirs[place]}")
    return len(ours.keys() | theirs.keys()), differing


def values(folder: Path) -> Iterator[Value]:
    for file in (METRICS, EVALUATION, SAMPLES):
        for number, record in enumerate(RunFolder(folder).read(file), start=1):
            for name, value in record.items():
                if file != METRICS or not is_measured(name):
                    yield Value(f"{file}, line {number}, {name}", exact(value))


def exact(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, sort_keys=True)


if __name__ == "__main__":
    sys.exit(main())
