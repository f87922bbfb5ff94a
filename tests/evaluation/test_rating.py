"""CodeElo's rating, against the figures that CodeElo's own calc_elo_rating gives for hand-written contests."""

from __future__ import annotations

import json
import math

import pytest

from flowrl_mega.evaluation.rating import (
    Contest,
    percentile,
    place,
    rate,
    rating_at,
    read_contest,
    read_ratings,
    result,
)
from flowrl_mega.settings import ConfigError


def contest(problems: str, rows: list[tuple[int, float, float]], name: str = "7") -> Contest:
    """A contest of problems "A 500" or, without points, "A"."""
    return Contest.model_validate(
        {
            "id": name,
            "problems": [dict(zip(("name", "points"), each.split(), strict=False)) for each in problems.split(", ")],
            "standings": [dict(zip(("rating", "points", "penalty"), row, strict=True)) for row in rows],
        }
    )


BY_POINTS = contest(
    "A 500, B 1000, C 1750",
    [(2100, 3150, 0), (1900, 3000, 0), (1700, 1500, 0), (1820, 1450, 0), (1500, 1400, 0), (1350, 950, 0)]
    + [(1200, 500, 0), (1430, 450, 0), (900, 300, 0), (800, 0, 0)],
)
BY_PENALTY = contest(
    "A, B, C, D",
    [(1800, 4, 120), (1650, 3, 60), (1600, 3, 85), (1400, 2, 20), (1450, 2, 30), (1380, 2, 55)]
    + [(1100, 1, 4), (1000, 1, 10), (1250, 0, 0)],
    name="8",
)


def after(**misses: int) -> dict[str, list[bool]]:
    """Attempts of which the first right one comes after so many wrong ones; those that follow do not count."""
    return {name: [False] * count + [True, False, True] for name, count in misses.items()}


# The results in the contests above, and the ratings that CodeElo's function computed for them (its own limit of
# participants lowered, CodeForces' answers written by hand): a tie, a score that ends at 0, and the best of all too.
FIGURES = [
    (BY_POINTS, after(A=0, B=0, C=0), (3250, 0), 2199),
    (BY_POINTS, after(A=1, B=0), (1450, 0), 1762),
    (BY_POINTS, after(A=1, B=3) | {"C": [False] * 8}, (1300, 0), 1621),
    (BY_POINTS, after(A=0, B=2), (1400, 0), 1621),
    (BY_POINTS, after(A=11), (0, 0), 787),
    (BY_POINTS, after(A=0), (500, 0), 1348),
    (BY_POINTS, after(A=4), (300, 0), 1015),
    (BY_POINTS, {"A": [False] * 8}, (0, 0), 787),
    (BY_POINTS, after(C=7), (1400, 0), 1621),
    (BY_PENALTY, after(A=0, B=0, C=0, D=0), (4, 0), 1899),
    (BY_PENALTY, after(A=2, B=4, C=0), (3, 60), 1879),
    (BY_PENALTY, after(A=0, B=0, D=0), (3, 0), 1899),
    (BY_PENALTY, after(A=2, C=0), (2, 20), 1574),
    (BY_PENALTY, after(A=2, C=1), (2, 30), 1461),
    (BY_PENALTY, after(B=1), (1, 10), 1102),
    (BY_PENALTY, after(B=0), (1, 0), 1351),
    (BY_PENALTY, {"B": [False]}, (0, 0), 922),
    (contest("A 500", [(1500, 500, 0)] * 3 + [(1500, 0, 0)]), after(A=0), (500, 0), 1500),  # as many as are expected
]


@pytest.mark.parametrize("held, attempts, scored, rating", FIGURES)
def test_ratings_are_codeelos(held, attempts, scored, rating):
    assert result(held, attempts) == scored
    assert rating_at(held, place(held, *scored)) == rating


LARGE = contest("A 500, B 1000, C 1750", [(800 + i * 37 % 1500, 3000 - 13 * i, 0) for i in range(201)], name="large")


def test_the_rating_is_the_mean_over_contests_with_enough_participants():
    """201 are CodeElo's fewest: it computed 1403 here, and no rating where the last of them is left out."""
    smaller = LARGE.model_copy(update={"id": "smaller", "standings": LARGE.standings[:-1]})
    attempts = {"7": after(A=1, B=0), "large": after(A=1, B=0), "smaller": after(A=0)}
    found = rate([BY_POINTS, LARGE, smaller, BY_PENALTY], attempts)
    assert (found.mean, found.by_contest, found.left_out) == (1403, {"large": 1403}, ["7", "smaller"])
    assert (
        rate([BY_POINTS, LARGE], {"7": after(A=1, B=0), "large": after(A=1, B=0)}, fewest=1).mean == (1762 + 1403) / 2
    )
    nothing = rate([BY_POINTS], attempts={"7": after(A=0)})
    assert math.isnan(nothing.mean) and nothing.left_out == ["7"]


def test_only_the_first_tries_count():
    assert result(BY_PENALTY, after(A=7, B=8), tries=8) == (1, 70)
    assert result(BY_PENALTY, after(A=15, B=16)) == (1, 150)
    assert rate([BY_POINTS], {"7": after(A=4)}, tries=4, fewest=1).mean == 787


def test_names_that_no_contest_has():
    with pytest.raises(ConfigError, match="contest 8 has no problem E, F; it has A, B, C, D"):
        result(BY_PENALTY, after(A=0, F=0, E=0))
    with pytest.raises(ConfigError, match="no contest file for 9; known: 8"):
        rate([BY_PENALTY], {"9": {}})
    with pytest.raises(ConfigError, match="more than one contest file for 8; give one of each"):
        rate([BY_PENALTY, BY_POINTS, BY_PENALTY], {})


def test_a_contest_is_read_from_its_file(tmp_path):
    rows = [{"rating": 1200, "points": 500.0, "penalty": 3, "handle": "x"}, {"rating": 1100, "points": 0}]
    file = tmp_path / "contest.json"
    file.write_text(json.dumps({"id": 7, "name": "Round", "problems": [{"name": "A"}], "standings": rows}))
    assert read_contest(file) == contest("A", [(1200, 500, 3), (1100, 0, 0)])


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"problems": []}, "problems = []: must hold at least one"),
        ({"standings": []}, "standings = []: must hold at least one"),
        ({"standings": [{"points": 3}]}, "standings.0.rating: field required"),
        ({"standings": [{"points": 3, "rating": "high"}]}, "standings.0.rating: input should be a valid integer"),
        ({"problems": [{"name": "A", "points": "many"}]}, "problems.0.points: input should be a valid number"),
        ({"problems": [{"name": "A"}, {"name": "A"}]}, "problems = A more than once; each needs a name of its own"),
        ({"id": None}, "id: input should be a valid string"),
        (None, "contest: input should be a valid dictionary"),
        ("[", "cannot be read as JSON"),
    ],
)
def test_what_is_wrong_in_a_contests_file_is_told_with_its_place(tmp_path, changes, said):
    whole = {"id": "7", "problems": [{"name": "A"}], "standings": [{"rating": 1200, "points": 1, "penalty": 0}]}
    file = tmp_path / "contest.json"
    file.write_text(changes if isinstance(changes, str) else json.dumps(changes and whole | changes))
    with pytest.raises(ConfigError) as caught:
        read_contest(file)
    assert str(caught.value).startswith(f"{file}: {said}") and "\n" not in str(caught.value)


def test_few_of_many_faults_are_told(tmp_path):
    (tmp_path / "contest.json").write_text(json.dumps({"id": "7", "problems": [{}], "standings": [{}] * 50}))
    with pytest.raises(ConfigError) as caught:
        read_contest(tmp_path / "contest.json")
    assert len(str(caught.value).splitlines()) == 5


@pytest.mark.parametrize("said", [[1500, 900.5, 1500], {"1500": 2, "900.5": 1}])
def test_ratings_are_read_in_both_forms(tmp_path, said):
    (tmp_path / "ratings.json").write_text(json.dumps(said))
    assert read_ratings(tmp_path / "ratings.json") == [900.5, 1500.0, 1500.0]


@pytest.mark.parametrize("text", ["[]", "{}", "3", "null", '["high"]', '{"1500": "many"}', "{", '{"high": 1}'])
def test_a_file_that_holds_no_ratings_is_named(tmp_path, text):
    (tmp_path / "ratings.json").write_text(text)
    with pytest.raises(ConfigError, match=r"ratings.json: "):
        read_ratings(tmp_path / "ratings.json")


@pytest.mark.parametrize(
    "rating, expected", [(500, 0.0), (900, 0.0), (900.5, 33.3), (1500, 33.3), (1501, 100.0), (1e4, 100.0)]
)
def test_percentiles(rating, expected):
    """The share that is strictly lower."""
    assert percentile(rating, [900, 1500, 1500]) == expected
