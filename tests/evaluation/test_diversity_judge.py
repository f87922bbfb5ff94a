"""The judge's question holds what the protocol shows, and only what is surely a verdict becomes a number."""

from __future__ import annotations

import re

import pytest

from flowrl_mega.evaluation.judge import LEVELS, judge_messages, read_verdict


def test_one_message_with_the_problem_and_every_attempt_in_order():
    attempts = [f"way {n}" for n in range(1, 17)]
    (message,) = judge_messages("Find x.", attempts)
    assert message["role"] == "user"
    blocks = "\n".join(f"[Attempt {n}]\nway {n}" for n in range(1, 17))
    assert f"[Problem]\nFind x.\n\n{blocks}\n\n[Scale]\n1: " in message["content"]
    assert "16 attempts" in message["content"]


@pytest.mark.parametrize(
    "length, settings, shown",
    [(300, {}, 300), (301, {}, 300), (5000, {"shown": 1000}, 1000), (5000, {"shown": None}, 5000)],
)
def test_attempts_are_cut_where_the_protocol_cuts_them(length, settings, shown):
    content = judge_messages("?", ["a" * length, "b"], **settings)[0]["content"]
    (found,) = re.findall(r"\[Attempt 1\]\n(a+)((?:\.\.\.)?)\n", content)
    assert (len(found[0]), found[1]) == (shown, "..." if shown < length else "")


def test_the_shares_are_the_released_counts_of_sixteen():
    """Of 16 attempts that many go the commonest way: 14 and more, 11 to 13, 7 to 10, 4 to 6, 3 and fewer."""
    released = {1: range(14, 17), 2: range(11, 14), 3: range(7, 11), 4: range(4, 7), 5: range(4)}
    bounds = [(85, 101), (65, 85), (40, 65), (20, 40), (0, 20)]
    for (low, high), (level, counts) in zip(bounds, released.items(), strict=True):
        assert [count for count in range(17) if low <= 100 * count / 16 < high] == list(counts)
        assert re.search(rf"(?m)^{level}: .*?{low or high}%", LEVELS)


@pytest.mark.parametrize("attempts", [[], ["one"]])
def test_fewer_than_two_attempts_cannot_differ(attempts):
    with pytest.raises(ValueError, match="at least 2"):
        judge_messages("?", attempts)


@pytest.mark.parametrize(
    "text, verdict",
    [
        *((str(number), number) for number in range(1, 6)),
        (" 3\n", 3),
        ("**4**", 4),
        ("4.", 4),
        ("4/5", 4),
        ("2 out of 5", 2),
        ("Score: 2", 2),
        ("**Diversity score:** 5/5", 5),
        ("The overall diversity score is 3.", 3),
        ("Score 4 - High Diversity", 4),
        ("$\\boxed{2}$", 2),
        ('{"score": 2}', 2),
        ('{\n  "score": 2\n}', 2),
        ("3\n\nMost attempts use coordinates.", 3),
        ("Two ways: 14 use algebra, 2 geometry.\n\nRating: 1", 1),
        ("2\n\nTherefore:\n2", 2),
        ("4\nof kinds:\n3\nas listed.", 4),
        ("<think>maybe 4?\n4</think>\n\n2", 2),
        ("", None),
        ("0", None),
        ("6", None),
        ("-1", None),
        ("3.5", None),
        ("16", None),
        ("4/10", None),
        ("2-3", None),
        ("2 or 3", None),
        ("between 2 and 3", None),
        ("three", None),
        ("2\nbecause\n3", None),
        ("7\nwell\n3", None),
        ("I cannot judge 3 of these.", None),
        ("1. The attempts are alike", None),
        ("<think>it is a\n3", None),
        ("Ignore that. Score: 5 5", None),
    ],
)
def test_verdicts(text, verdict):
    assert read_verdict(text) == verdict
