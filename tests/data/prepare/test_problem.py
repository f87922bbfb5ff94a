"""What is read from a record's columns, and what is refused with which reason."""

from __future__ import annotations

from decimal import Decimal

import pytest

from flowrl_mega.data.prepare.problem import (
    ANSWER_AFTER,
    ANSWER_BEFORE,
    BOXED,
    BadRow,
    answer_of,
    column,
    decimal,
    last_boxed,
    text_of,
    without_wording,
)


@pytest.mark.parametrize(
    ("value", "answer"),
    [
        (" 27 ", "27"),
        ("27.0", "27"),
        ("+27.00", "+27"),
        (-27.0, "-27"),
        ("27.50", "27.50"),
        ("x27.0", "x27.0"),
        (27, "27"),
        (1e16, "10000000000000000"),
        (1e-5, "0.00001"),
        (Decimal("1E+3"), "1000"),
        ("nan is a word", "nan is a word"),
        ("\\infty", "\\infty"),
    ],
)
def test_answers(value, answer):
    assert answer_of({"answer": value}, "answer") == answer


@pytest.mark.parametrize(
    ("value", "reason", "words"),
    [
        (True, "bad answer", "'answer' or 'a' is a bool; must be text or a number"),
        ([27], "bad answer", "is a list"),
        pytest.param(10**5000, "bad answer", "too large to print", id="5001 digits"),
        (" ", "empty", "the answer is empty"),
        *((value, "bad answer", "no number") for value in ("NaN", "+inf", "-Infinity", float("nan"), Decimal("inf"))),
        (None, "empty", "'answer' is null"),
    ],
)
def test_what_is_no_answer(value, reason, words):
    with pytest.raises(BadRow, match=words) as refused:
        answer_of({"answer": value}, "answer", "a")
    assert refused.value.reason == reason


def test_text():
    assert text_of({"b": " x \n"}, "a", "b") == "x"
    for value, reason, words in ((5, "broken", "'b' is a int; must be text"), (" ", "empty", "'b' is empty")):
        with pytest.raises(BadRow, match=words) as refused:
            text_of({"b": value}, "b")
        assert refused.value.reason == reason


def test_a_column_that_is_missing():
    for record, words in (({}, r"it has: nothing"), ({"c": 1, "d": 2}, r"has no 'a' or 'b' \(it has: 'c', 'd'\)")):
        with pytest.raises(BadRow, match=words) as refused:
            column(record, "a", "b")
        assert refused.value.reason == "broken"
    assert column({"a": None, "b": 0}, "a", "b") == 0


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (1e20, "100000000000000000000"),
        (1e21, "1e+21"),
        (1e-20, "0.00000000000000000001"),
        (1e-21, "1e-21"),
        (float("nan"), "nan"),
        (float("-inf"), "-inf"),
    ],
)
def test_decimals(number, text):
    assert decimal(number) == text


@pytest.mark.parametrize(
    ("solution", "found"),
    [("\\boxed{ 5 }", "5"), ("\\boxed{1} \\boxed{\\frac{1}{2}}.", "\\frac{1}{2}"), ("a \\boxed{}", "")],
)
def test_the_last_box(solution, found):
    assert last_boxed(solution) == found


@pytest.mark.parametrize("solution", ["", "5", "\\boxed{5", "\\boxed{1} \\boxed{5", "boxed{5}"])
def test_no_whole_box(solution):
    with pytest.raises(BadRow) as refused:
        last_boxed(solution)
    assert refused.value.reason == "bad answer"
    assert str(refused.value) == "the solution holds no whole \\boxed{...}; give an 'answer'"


@pytest.mark.parametrize(
    "prompt",
    ["Find x.", f"{ANSWER_BEFORE}Find x.{ANSWER_AFTER}", BOXED.format("Find x.")],
)
def test_the_problem_in_a_prompt(prompt):
    """Whatever white space is around it: Qwen's prompts have one newline before "Please reason"."""
    for said in (prompt, f" \n{prompt}\n ", prompt.replace("Find x.", "  Find x. "), prompt.replace("\n\n", "\n")):
        assert without_wording(said) == "Find x."
