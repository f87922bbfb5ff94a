"""Finds problems of test sets among the training problems: the same words, or runs of words in common.

Words are compared without case and punctuation. As for GPT-3 (arXiv 2005.14165, appendix C) a run is 13 words, and one
that occurs in more than 10 different training problems is a phrase and left out. Phrases remain all the same ("m and n
are relatively prime positive integers ..."), so what tells is the share of a test problem's runs that one training
problem has. A test problem of 8 to 12 words is one run; a shorter one counts only where a training problem is no more.
"""

from __future__ import annotations

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from flowrl_mega.data.prepare.problem import without_wording
from flowrl_mega.data.prepare.sources import records

RUN, SHORTEST, COMMON = 13, 8, 10
COLUMNS = ("problem", "Problem", "question", "Question", "question_content", "prompt")
SHOWN = 3  # examples in the table
NEAR = 0.5  # from this share of its runs on, a problem is taken for the same
_WORD = re.compile(r"\w+")


class Benchmark(NamedTuple):
    """A test set's problems."""

    name: str
    problems: dict[str, str]  # by "NAME/row": the words, joined
    unreadable: int


class Overlap(NamedTuple):
    """The problems of one test set that are in the training set, by id."""

    name: str
    problems: int
    unreadable: int
    exact: dict[str, list[str]]  # test -> training problems of the same words
    shares: dict[str, dict[str, float]]  # test -> training problem -> share of the test problem's runs; not the exact

    def near(self, share: float) -> dict[str, list[str]]:
        """The test problems of which a training problem has at least this share, with the best training problem."""
        return {
            test: [max(hits, key=hits.__getitem__)] for test, hits in self.shares.items() if max(hits.values()) >= share
        }

    def train_ids(self, share: float) -> set[str]:
        """Training problems of the same words as a test problem, or with at least this share of its runs."""
        same = {train for ids in self.exact.values() for train in ids}
        return same | {train for hits in self.shares.values() for train, held in hits.items() if held >= share}


def words(text: str) -> list[str]:
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def read_test_set(name: str, split: str) -> Benchmark:
    """The problems of a file or data set of any recipe's form. ConfigError where it cannot be opened."""
    problems, unreadable, stem = {}, 0, Path(name).stem
    for record in records([name], split):
        text = _problem(record.value or {})
        if text:
            problems[f"{stem}/{record.row}"] = " ".join(words(text))
        else:
            unreadable += 1
    return Benchmark(stem, problems, unreadable)


def _problem(record: dict[str, Any]) -> str:
    """The problem in a record's first known column; of chat messages the last one."""
    value = next((record[name] for name in COLUMNS if record.get(name)), "")
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
    return without_wording(value) if isinstance(value, str) else ""


def find(train: Iterable[tuple[str, str]], tests: list[Benchmark]) -> list[Overlap]:
    """`train` are ids and problems. In memory are the test sets' runs, and a hash of each training problem."""
    runs, starts = _runs(tests)
    whole = {problem for test in tests for problem in test.problems.values()}
    copies: dict[int, list[str]] = defaultdict(list)  # training problems of the same words
    exact: dict[str, int] = {}  # words of a test problem -> of which training problem
    found: dict[str, list[int]] = defaultdict(list)  # run -> the training problems that hold it
    for train_id, text in train:
        said = words(text)
        joined = " ".join(said)
        key = hash(joined)
        copies[key].append(train_id)
        if len(copies[key]) > 1:
            continue
        if joined in whole:
            exact[joined] = key
        for run in set(_held(said, runs, starts)):
            if len(found[run]) <= COMMON:
                found[run].append(key)
    return [_overlap(test, exact, found, copies) for test in tests]


def _runs(tests: list[Benchmark]) -> tuple[set[str], dict[str, set[str]]]:
    """(all runs of test problems, short problems by their first SHORTEST words)."""
    runs: set[str] = set()
    starts: dict[str, set[str]] = defaultdict(set)
    for test in tests:
        for problem in test.problems.values():
            said = problem.split(" ")
            if SHORTEST <= len(said) < RUN:
                starts[" ".join(said[:SHORTEST])].add(problem)
            runs.update(_runs_of(said, RUN))
    return runs, starts


def _runs_of(said: list[str], length: int) -> Iterator[str]:
    return (" ".join(said[i : i + length]) for i in range(len(said) - length + 1))


def _held(said: list[str], runs: set[str], starts: dict[str, set[str]]) -> Iterator[str]:
    """The test sets' runs, and whole short problems, that these words hold."""
    yield from (run for run in _runs_of(said, RUN) if run in runs)
    for i, start in enumerate(_runs_of(said, SHORTEST) if starts else ()):
        for problem in starts.get(start, ()):
            if said[i : i + len(short := problem.split(" "))] == short:
                yield problem


def _overlap(
    test: Benchmark, exact: dict[str, int], found: dict[str, list[int]], copies: dict[int, list[str]]
) -> Overlap:
    same, shares = {}, {}
    for test_id, problem in test.problems.items():
        if problem in exact:
            same[test_id] = copies[exact[problem]]
            continue
        said = problem.split(" ")
        held = [found.get(run, []) for run in {*_runs_of(said, RUN)} or {problem}]
        telling = [keys for keys in held if len(keys) <= COMMON]
        runs = Counter(key for keys in telling for key in keys)
        if runs:
            shares[test_id] = {i: round(n / len(telling), 4) for key, n in runs.items() for i in copies[key]}
    return Overlap(test.name, len(test.problems), test.unreadable, same, shares)


def table(overlaps: list[Overlap]) -> str:
    """A Markdown table, one line per test set."""
    lines = [
        f"| test set | problems | same words | {NEAR:.0%} of its runs | any run | training rows of the first two | for "
        "example |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for found in overlaps:
        near = found.near(NEAR)
        pairs = [f"{test} = {ids[0]}" for test, ids in found.exact.items()]
        pairs += [f"{test} ~ {ids[0]}" for test, ids in near.items()]
        problems = f"{found.problems}" + (f" (and {found.unreadable} unreadable)" if found.unreadable else "")
        lines.append(
            f"| {found.name} | {problems} | {len(found.exact)} | {len(near)} | {len(found.shares)} | "
            f"{len(found.train_ids(NEAR))} | {', '.join(pairs[:SHOWN]) or '-'} |"
        )
    return "\n".join(lines)
