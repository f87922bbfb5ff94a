"""What the end of a program, or its words, mean for its verdict: each rule alone, without the sandbox."""

from __future__ import annotations

import json
from functools import reduce

import pytest

from flowrl_mega.rewards.code.judge import (
    FORGED,
    Verdict,
    count,
    failed_check,
    judge_answer,
    ready_word,
    trouble,
    wrong,
)
from flowrl_mega.rewards.sandbox.client import Outcome


@pytest.mark.parametrize(
    ("end", "code", "stderr", "failure"),
    [
        ("exit", 0, "MemoryError", None),
        ("exit", 1, "Traceback:\nMemoryError: no room\n", ("memory", "MemoryError: no room")),
        ("exit", 1, "MemoryError\nValueError: MemoryError", ("crash", "ValueError: MemoryError")),
        ("exit", 1, "\x1b[31mValueError: a\tb", ("crash", "?[31mValueError: a?b")),
        ("exit", 3, " \n", ("crash", "exit status 3")),
        ("wall", 9, "", ("time-out", "took too long (reward.code.wall_s)")),
        ("cpu", 9, "", ("time-out", "used too much CPU time (reward.code.cpu_s)")),
        ("memory", 9, "", ("memory", "used too much memory (reward.code.memory_mb)")),
        ("processes", 9, "", ("processes", "started too many processes (reward.code.processes)")),
        ("supervisor", 9, "", ("crash", "its supervisor was killed, as a program can without a user of its own")),
        ("flood", 9, "", ("output flood", "wrote too much (reward.code.output_kb)")),
        ("signal", 11, "MemoryError", ("crash", "killed by SIGSEGV")),
        ("signal", 99, "", ("crash", "killed by signal 99")),
    ],
)
def test_how_a_program_ended(end, code, stderr, failure):
    assert trouble(Outcome(end, code, "", stderr)) == failure


@pytest.mark.parametrize(
    ("word", "failure"),
    [
        (["AssertionError", "", "assert f(7) == 3"], ("wrong", "fails assert f(7) == 3")),
        (["AssertionError", "too few", "assert f(7) == 3"], ("wrong", "fails assert f(7) == 3 (too few)")),
        (["ValueError", "too few", "f(7)"], ("crash", "ValueError: too few")),
        (["MemoryError", "", "f(7)"], ("memory", "MemoryError: ")),
    ],
)
def test_the_last_word_of_a_check(word, failure):
    assert failed_check(b"F" + json.dumps(word).encode()) == failure


def test_a_check_that_passes_or_does_not_work():
    assert failed_check(b"P") is None
    with pytest.raises(ValueError, match=r"row\['tests'\]\['code'\] does not work: NameError$"):
        failed_check(b"BNameError")


@pytest.mark.parametrize(
    ("word", "failure"),
    [
        (b"R", None),
        (b'M["AttributeError", "no attribute \'most\'"]', ("wrong", "has no Solution.most")),
        (b'M["AttributeError", "no attribute \'least\'"]', ("crash", "AttributeError: no attribute 'least'")),
        (b'M["NameError", "most"]', ("crash", "NameError: most")),
        (b'M["MemoryError", ""]', ("memory", "MemoryError: ")),
        *((word, FORGED) for word in (b"", b"Ready", b"r", b"M", b"M5", b'M["NameError"]', b"M" + b"[" * 100_000)),
    ],
)
def test_the_first_word_of_a_program_for_calls(word, failure):
    assert ready_word(word, "Solution.most") == failure


@pytest.mark.parametrize(
    ("answer", "failure"),
    [
        (b"V5", None),
        (b"V6", ("wrong", "expected 5, got 6")),
        (b"X5", ("wrong", "expected 5, got 5")),
        (b'E["ValueError", "no"]', ("crash", "ValueError: 'no'")),
        (b'E["MemoryError", ""]', ("memory", "MemoryError: ''")),
        *((answer, ("wrong", "expected 5, got what is no value")) for answer in (b"", b"V", b"E5", b'V{"t": 1}')),
    ],
)
def test_an_answer_to_a_call(answer, failure):
    assert judge_answer(answer, 5) == failure


@pytest.mark.parametrize(
    ("expected", "got", "why"),
    [
        (" 5\n", "6 \n", "expected '5', got '6'"),
        (" 5", 6, "expected ' 5', got 6"),
        (5, "6 ", "expected 5, got '6 '"),
        ("a", "\ud800", "expected 'a', got '\\ud800'"),
        ("a" * 58, "a" * 59, f"expected '{'a' * 58}', got '{'a' * 59}..."),
        pytest.param(5, 10**5000, "expected 5, got a int", id="5001 digits"),
        pytest.param(5, reduce(lambda inner, _: [inner], range(10_000), []), "expected 5, got a list", id="10001 deep"),
    ],
)
def test_reasons_are_short(expected, got, why):
    """Of one line, and of 60 characters a value."""
    assert wrong(expected, got) == ("wrong", why)


def test_what_is_counted():
    """Up to the first failure or all of them; the first is named."""
    of_four = [None, ("wrong", "a"), ("crash", "b"), None].__getitem__
    assert count(of_four, 4, all_of_them=False) == Verdict(1, 4, "test 2 of 4: a", "wrong")
    assert count(of_four, 4, all_of_them=True) == Verdict(2, 4, "test 2 of 4: a", "wrong")
    assert count(of_four, 1, all_of_them=False) == Verdict(1, 1, "passes 1 tests", "right")
