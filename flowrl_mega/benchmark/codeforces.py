"""CodeForces contests from files, and the rating that a human of the same results has (evaluation/rating.py).

DATA/codeforces/ holds a file for each contest, as rating.py reads it, in which every problem also has its "statement"
and "tests": {"inputs": [text], "outputs": [text]}; and ratings.json, a list of the ratings of humans, for the
percentile.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from math import isnan
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare.code_recipes import STDIN, check_tests
from flowrl_mega.data.prepare.problem import BadRow, Problem, code
from flowrl_mega.evaluation.rating import percentile, rate, read_contest, read_ratings

NAME, RATINGS = "codeforces", "ratings.json"


def read_problems(folder: Path) -> list[Problem]:
    """Every contest's problems, told apart by their rows' "contest" and "name". ConfigError naming file and problem."""
    found = []
    for file in _files(folder):
        contest = read_contest(file)
        for problem in json.loads(file.read_text())["problems"]:
            tests = {"type": "stdin", **(problem.get("tests") or {})}
            try:
                check_tests(tests)
                statement = str(problem["statement"])
            except (BadRow, KeyError) as fault:
                why = fault if isinstance(fault, BadRow) else "has no 'statement'"
                raise ConfigError(f"{file}: problem {problem['name']}: {why}") from None
            made = code(statement, STDIN.format(statement), tests)
            found.append(Problem(made.text, made.row | {"contest": contest.id, "name": problem["name"]}))
    return found


def rating(
    folder: Path, rows: Sequence[Mapping[str, Any]], right: Iterable[tuple[int, bool]], k: int
) -> dict[str, Any]:
    """The rating of answers, of which `right` says the problem and whether it passes, in the order of the attempts."""
    attempts: dict[str, dict[str, list[bool]]] = {}
    for i, passes in right:
        attempts.setdefault(rows[i]["contest"], {}).setdefault(rows[i]["name"], []).append(passes)
    found = rate([read_contest(file) for file in _files(folder)], attempts, tries=k)
    mean = None if isnan(found.mean) else found.mean
    told: dict[str, Any] = {"rating": mean, "contests": found.by_contest, "left_out": found.left_out}
    if found.by_contest and (file := folder / RATINGS).is_file():
        told["percentile"] = percentile(found.mean, read_ratings(file))
    return told


def _files(folder: Path) -> list[Path]:
    files = sorted(file for file in folder.glob("*.json") if file.name != RATINGS)
    if not files:
        raise ConfigError(f"{folder}: holds no contests; give a JSON file for each, see docs/evaluation.md")
    return files
