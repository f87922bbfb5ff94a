"""CodeElo's rating (Quan et al. 2025, arXiv 2501.01257): what a human of the same results in CodeForces contests has.

A contest is a JSON file, of CodeForces' API the calls contest.standings and contest.ratingChanges in one:
    {"id": "2024",
     "problems": [{"name": "A", "points": 500}, ...],    null or no points: a contest of solved problems and penalties
     "standings": [{"rating": 1411, "points": 1250.0, "penalty": 0}, ...]}
with the rating that each rated participant had before it. Other keys may be there. The rule is CodeElo's code, number
for number: of a problem's attempts the first that passes counts, with 50 points less (or 10 minutes of penalty) for
each before it; what has as many points and no more penalty stands before the model; and the rating is the largest whole
number, up to 99 above the best participant's, at which the Elo formula expects no fewer before the model, with itself
among them, than there were, or 0. So the winner of a contest gets that limit, whatever it won by.
"""

from __future__ import annotations

import json
from bisect import bisect_left
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import ValidationError

from flowrl_mega.settings import ConfigError, Settings

TRIES = 16  # attempts at a problem; CodeElo has 8
FEWEST = 201  # participants; CodeElo leaves out contests with fewer
MISS_POINTS, MISS_PENALTY = 50, 10
ABOVE_BEST = 100
FAULTS = 5  # of one file that are told


class Problem(Settings, extra="ignore"):
    name: str
    points: float | None = None


class Participant(Settings, extra="ignore"):
    rating: int
    points: float
    penalty: float = 0.0


class Contest(Settings, extra="ignore"):
    id: str
    problems: tuple[Problem, ...]
    standings: tuple[Participant, ...]


@dataclass(frozen=True)
class Rating:
    mean: float  # over the contests that are rated; nan where there is none
    by_contest: dict[str, int]
    left_out: list[str]  # contests with too few participants


def read_contest(path: Path) -> Contest:
    """The contest in a file. Raises ConfigError that names the file and what is wrong in it."""
    said = _read(path)
    if isinstance(said, dict) and isinstance(said.get("id"), int):
        said = {**said, "id": str(said["id"])}
    try:
        contest = Contest.model_validate(said)
    except ValidationError as error:
        faults = [(".".join(map(str, fault["loc"])), fault["msg"].lower()) for fault in error.errors()[:FAULTS]]
        raise ConfigError("\n".join(f"{path}: {where or 'contest'}: {what}" for where, what in faults)) from None
    for name in ("problems", "standings"):
        if not getattr(contest, name):
            raise ConfigError(f"{path}: {name} = []: must hold at least one")
    if twice := _repeated([problem.name for problem in contest.problems]):
        raise ConfigError(f"{path}: problems = {', '.join(twice)} more than once; each needs a name of its own")
    return contest


def result(contest: Contest, attempts: Mapping[str, Sequence[bool]], tries: int = TRIES) -> tuple[float, float]:
    """Points and penalty of a model: `attempts` says of each problem, by name, whether its attempts pass, in order.

    Only the first `tries` attempts count.
    """
    known = sorted(problem.name for problem in contest.problems)
    if unknown := sorted(attempts.keys() - set(known)):
        raise ConfigError(f"contest {contest.id} has no problem {', '.join(unknown)}; it has {', '.join(known)}")
    points = penalty = 0.0
    for problem in contest.problems:
        tried = list(attempts.get(problem.name, ()))[:tries]
        if not any(tried):
            continue
        misses = tried.index(True)
        if problem.points is None:
            points += 1
            penalty += MISS_PENALTY * misses
        else:
            points += max(0.0, problem.points - MISS_POINTS * misses)
    return points, penalty


def place(contest: Contest, points: float, penalty: float) -> int:
    """How many participants stand before a model with this result: those that are as good count."""
    return sum((row.points, -row.penalty) >= (points, -penalty) for row in contest.standings)


def rating_at(contest: Contest, before: int) -> int:
    """The rating at which a participant would be expected to have so many before it, by bisection in whole numbers."""
    ratings = np.array([row.rating for row in contest.standings], dtype=np.float64)
    low, high = 0, int(ratings.max()) + ABOVE_BEST
    while high - low > 1:
        middle = (low + high) // 2
        expected = 1 + float((1 / (1 + 10 ** ((middle - ratings) / 400))).sum())
        if expected < before:
            high = middle
        else:
            low = middle
    return low


def rate(
    contests: Sequence[Contest],
    attempts: Mapping[str, Mapping[str, Sequence[bool]]],
    tries: int = TRIES,
    fewest: int = FEWEST,
) -> Rating:
    """The mean rating over the contests that were taken part in: `attempts` by contest and problem."""
    known = [contest.id for contest in contests]
    if twice := _repeated(known):
        raise ConfigError(f"more than one contest file for {', '.join(twice)}; give one of each")
    if unknown := sorted(attempts.keys() - set(known)):
        raise ConfigError(f"no contest file for {', '.join(unknown)}; known: {', '.join(known)}")
    by_contest: dict[str, int] = {}
    left_out: list[str] = []
    for contest in contests:
        if contest.id not in attempts:
            continue
        points, penalty = result(contest, attempts[contest.id], tries)
        if len(contest.standings) < fewest:
            left_out.append(contest.id)
        else:
            by_contest[contest.id] = rating_at(contest, place(contest, points, penalty))
    mean = sum(by_contest.values()) / len(by_contest) if by_contest else nan
    return Rating(mean, by_contest, left_out)


def read_ratings(path: Path) -> list[float]:
    """All users' ratings, sorted, from a JSON list of them or a JSON mapping of rating to how many users have it."""
    said = _read(path)
    try:
        if isinstance(said, dict):
            found = [float(rating) for rating, users in said.items() for _ in range(users)]
        else:
            found = [float(rating) for rating in said]
    except (TypeError, ValueError) as error:
        raise ConfigError(
            f"{path}: must be a JSON list of ratings, or of each how many users have it ({error})"
        ) from None
    if not found:
        raise ConfigError(f"{path}: holds no rating; give the list that percentiles are to be read from")
    return sorted(found)


def percentile(rating: float, ratings: Sequence[float]) -> float:
    """The percentage of the sorted `ratings` that are lower, to one place behind the point, as CodeElo gives it."""
    return round(bisect_left(ratings, rating) / len(ratings) * 100, 1)


def _repeated(names: Sequence[str]) -> list[str]:
    return [name for name, times in Counter(names).items() if times > 1]


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path}: cannot be read as JSON ({error})") from None
