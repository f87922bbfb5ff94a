"""CodeForces from files: problems told apart, attempts in order, the rating and its place among humans."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowrl_mega.benchmark import codeforces, table
from flowrl_mega.benchmark.scores import _rating
from flowrl_mega.config import ConfigError
from flowrl_mega.evaluation.rating import rating_at, read_contest

TESTS = {"inputs": ["1\n"], "outputs": ["2\n"]}


def write(folder: Path, contest: str, humans: int, **change: Any) -> None:
    """A contest of two problems in which human i has rating 1000 + i and 10 i points."""
    problems = [{"name": name, "points": 500, "statement": f"Add {name}.", "tests": TESTS} | change for name in "AB"]
    standings = [{"rating": 1000 + i, "points": 10.0 * i, "penalty": 0} for i in range(humans)]
    folder.mkdir(exist_ok=True)
    (folder / f"{contest}.json").write_text(json.dumps({"id": contest, "problems": problems, "standings": standings}))


def test_a_rating_of_attempts_in_their_order(tmp_path: Path) -> None:
    """A by the second attempt (450 points), B never: of 301 humans 256 have 450 points or more and stand before it."""
    folder = tmp_path / "codeforces"
    write(folder, "7", 301)
    write(folder, "9", 20)
    (folder / "ratings.json").write_text(json.dumps([0, 0, 0, 5000]))
    (problems,) = table.load(["codeforces"], str(tmp_path), None, 0)
    assert [(row["contest"], row["name"]) for row in problems.rows] == [("7", "A"), ("7", "B"), ("9", "A"), ("9", "B")]
    assert problems.rows[0]["kind"] == "code" and problems.rows[0]["tests"] == {"type": "stdin", **TESTS}
    right = [(0, False), (0, True), (1, False), (1, False), (2, True), (2, True), (3, True), (3, True)]
    found = codeforces.rating(folder, problems.rows, right, 2)
    expected = rating_at(read_contest(folder / "7.json"), 256)
    assert (found["rating"], found["contests"], found["left_out"]) == (expected, {"7": expected}, ["9"])
    assert found["percentile"] == 75.0
    told = f"rating {expected:.2f}, higher than that of 75.0% of humans (1 contests; 1 left out"
    assert _rating(found).startswith(told)


def test_only_small_contests_give_no_rating(tmp_path: Path) -> None:
    write(tmp_path / "codeforces", "9", 20)
    (problems,) = table.load(["codeforces"], str(tmp_path), 1, 0)
    found = codeforces.rating(tmp_path / "codeforces", problems.rows, [(0, True)], 1)
    assert found["rating"] is None and "no rating" in _rating(found)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"statement": None}, None),
        ({"tests": None}, "7.json: problem A: 'inputs' and 'outputs' must be lists"),
        ({"tests": {"inputs": [1], "outputs": [2]}}, "problem A: inputs and outputs of programs must be text"),
    ],
)
def test_a_problem_without_tests_is_named(tmp_path: Path, change: dict[str, Any], said: str | None) -> None:
    write(tmp_path / "codeforces", "7", 3, **change)
    if said is None:
        contest = json.loads((tmp_path / "codeforces" / "7.json").read_text())
        del contest["problems"][0]["statement"]
        (tmp_path / "codeforces" / "7.json").write_text(json.dumps(contest))
        said = "7.json: problem A: has no 'statement'"
    with pytest.raises(ConfigError, match=said):
        table.load(["codeforces"], str(tmp_path), None, 0)


def test_it_wants_a_folder() -> None:
    with pytest.raises(ConfigError, match="give data, a folder with codeforces/ in it"):
        table.load(["codeforces"], None, None, 0)
