"""Prompts and rewards from reasoning-gym. The oracle is arithmetic done here, and answers judged by hand."""

import json
import re

import pytest

pytestmark = pytest.mark.integration
reasoning_gym = pytest.importorskip("reasoning_gym", reason="the example's requirements are not installed")

from flowrl_mega.config import ConfigError  # noqa: E402
from flowrl_mega.data.prepare.reasoning_gym import make_rows, write_jsonl  # noqa: E402
from flowrl_mega.rewards.reasoning_gym import extract, score  # noqa: E402

pytestmark = pytest.mark.integration
PRODUCTS = {"min_digits": 1, "max_digits": 1}


def test_rows_are_the_library_s_and_follow_the_seed():
    rows = make_rows("products", 20, seed=3, **PRODUCTS)
    assert rows == make_rows("products", 20, seed=3, **PRODUCTS)
    assert rows != make_rows("products", 20, seed=4, **PRODUCTS)
    for row in rows:
        left, right = map(int, re.search(r"(\d) \* (\d)", row["prompt"]).groups())
        assert row["answer"] == str(left * right)
        assert row["task"] == "products"


def test_a_file_gives_the_same_rows_back(tmp_path):
    rows = make_rows("gcd", 5, seed=0, max_value=20)
    path = tmp_path / "new" / "train.jsonl"
    write_jsonl(rows, path)
    assert [json.loads(line) for line in path.read_text().splitlines()] == rows
    assert [p.name for p in path.parent.iterdir()] == ["train.jsonl"], "no partial file stays"


@pytest.mark.parametrize(
    "task",
    [
        "products",
        "gcd",
        "chain_sum",
        "spell_backward",
        "letter_counting",
        "word_sorting",
        "number_sorting",
        "countdown",
    ],
)
def test_the_right_answer_scores_one_after_the_json_round_trip(task):
    """Scorers read the record: tuples that became lists must not change the score."""
    for row in make_rows(task, 5, seed=1):
        assert score(row, f"<answer>{row['answer']}</answer>")[0] == 1.0
        assert score(row, "<answer>no idea</answer>")[0] < 0.5


@pytest.mark.parametrize(
    ("response", "reward"),
    [
        ("12", 1.0),
        ("3 * 4 = 12.", 1.0),
        ("The result is **12**", 1.0),
        ("<answer>12</answer> I like 7", 1.0),
        ("12 is 3 * 4", 0.0),  # the last number counts: an answer cannot be hedged by listing many
        ("1 2 3 4 12 13", 0.0),
        ("-12", 0.0),
        ("112", 0.0),  # the library alone would give 2/3 for it
        ("<answer>112</answer>", 0.0),
        ("twelve", 0.0),
        ("", 0.0),
    ],
)
def test_number_answers(response, reward):
    row = {"task": "products", "answer": "12", "entry": {"answer": "12", "question": "", "metadata": {}}}
    assert score(row, response)[0] == reward


def test_extraction_says_where():
    assert extract("it is 1,234.50 or so", "7") == ("1234.50", "number")
    assert extract("  suN \n", "nus") == ("suN", "text")
    assert extract("<answer>a</answer><answer> b </answer>", "b") == ("b", "tag")
    assert extract(" ", "b") == (None, "text")


def test_the_reason_names_both_answers():
    row = make_rows("products", 1, seed=0, **PRODUCTS)[0]
    reward, reason = score(row, f"I think {row['answer']}")
    assert reward == 1.0
    assert reason == f"number {row['answer']!r}, right: {row['answer']!r}"


@pytest.mark.parametrize(
    ("task", "config", "named"),
    [
        ("no_such_task", {}, "no_such_task"),
        ("products", {"digits": 2}, "digits"),
        ("products", {"min_digits": 3, "max_digits": 1}, "max_digits"),
    ],
)
def test_bad_settings_are_named(task, config, named):
    with pytest.raises(ConfigError, match=named):
        make_rows(task, 1, seed=0, **config)
