"""Where the answer stands in a response, the limit on CPU time, and responses that are long or too large to compute."""

from __future__ import annotations

import contextlib
import resource
import signal
import time

import pytest
from math_verify.errors import TimeoutException

from flowrl_mega.rewards import limits, math, minerva
from flowrl_mega.rewards.final_answer import final_answer
from flowrl_mega.rewards.limits import cpu_limit


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("<think>Maybe \\boxed{41}</think>\nThe answer is 42.", "42."),
        ("<think>\\boxed{41}</think>\nAnswer: 42", "42"),
        ("<think>\\boxed{41}</think>\nI am done.", "41"),  # no answer there
        ("<think>\\boxed{41}", "41"),
        ("<think>a</think>\\boxed{1}</think>The answer is 2", "2"),
        ("Earlier $\\boxed{7}$ was tried, but the answer is $\\boxed 3$.", "3"),
        ("\\boxed3", "3"),
        ("\\boxed -12.5 is it", "-12.5"),
        ("\\boxed 3.14", "3.14"),
        ("\\boxed x", "x"),
        ("\\boxed{7} and \\boxedly 3", "7"),
        ("<answer>42</answer>", "42"),
        ("\\boxed{7} <answer> 42 </answer>", "42"),
        ("<answer>The answer is \\boxed{42}</answer>", "42"),
        ("<answer>1</answer> no, \\boxed{2}", "2"),
        ("<answer>42", None),
        ("答案：12", "12"),
        ("答案: 12", "12"),
        ("答案是12。", "12"),
        ("정답: 12", "12"),
        ("Answer：12", "12"),
        ("Answer : 12", "12"),
        ("答案是：12", "12"),
        ("答案为12", "12"),
        ("答案為 12", "12"),
        ("正解：12", "12"),
        ("答え: 12", "12"),
        ("답: 12", "12"),
        ("정답은 12", "12"),
        ("**答案** : 12", "12"),
        ("the answering is 12", None),
        ("the answer isn't 12", None),
        ("The  final  answer  is : 12 \nI think", "12"),
        ("The answer is:\n12", "12"),
        ("The answer is 11. The answer is 12.", "12."),
        ("The answer is 12. \nThe answer is", "12"),
        ("Our final answer is：12", "12"),
        ("\\fbox{3}", "3"),
        ("\\boxed {3}", "3"),
        ("\\boxed \n X", "X"),
        ("\\boxed  -12 apples", "-12"),
        ("\\boxed xy", None),
        ("\\boxed xY", None),
        ("\\boxedx", None),
        ("<answer> </answer>", None),
        # Lists of boxes
        *(
            (f"\\boxed{{1}}{between}\\boxed{{2}}", "1, 2")
            for between in (",", ";", "and", " or ", "; or\n", ",and ", ", and ")
        ),
        *((f"\\boxed{{1}}{between}\\boxed{{2}}", "1, 2") for between in ("$, $", "\\), \\(", " \\] and \\[ ")),
        *((f"\\boxed{{1}} \\text{between} \\boxed{{2}}", "1, 2") for between in ("{and}", " { or }")),
        *((f"\\boxed{{1}}{between}\\boxed{{2}}", "2") for between in (" ", ".", "+", ", or so", "\\text{so}")),
    ],
)
def test_where_the_answer_stands(response, answer):
    """The strongest form after the last </think>; its last use."""
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "The answer is" + "\n" * 32_000,
        "the answer is\n" * 6_000,
        "Answer:" + "\n" * 32_000,
        "<answer>" * 10_000,
        "</think>" * 10_000,
        "\\boxed " * 10_000,
        "the " + " " * 64_000,
        "\\boxed{1}</answer>" * 4_000,
    ],
)
def test_reading_is_linear(response):
    """Milliseconds, with room for a busy machine: with the square of the length these took seconds."""
    start = time.process_time()
    final_answer(response)
    assert time.process_time() - start < 0.1


@pytest.mark.parametrize(
    ("gold", "given", "right"),
    [
        ("033", "33", True),
        ("33", "033", True),
        ("0", "000", True),
        ("-7", "-007", True),
        ("33", "330", False),
        ("33", "33.0", False),
        ("0.5", "00.5", False),
        ("7", "-07", False),
        ("", "0", False),
        ("²", "0²", False),
    ],
)
def test_leading_zeros_of_integers(gold, given, right):
    """In DAPO's rule, both ways, in a line and in a box; nothing else of it changes."""
    assert minerva.same(given, gold) == right
    if gold:
        for response in (f"Answer: {given}", f"\\boxed{{{given}}}"):
            assert (math.dapo({"id": "t/1", "answer": gold}, response)[0] == 1.0) == right


def spin(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def test_the_limit_counts_cpu_time_and_not_the_clock():
    """So that what the machine's other jobs do decides no verdict."""
    with cpu_limit(0.2):
        time.sleep(0.5)
    with pytest.raises(TimeoutException), cpu_limit(0.1):
        spin(5)


def test_the_clock_ends_what_sleeps():
    """At sixty times the limit."""
    with pytest.raises(TimeoutException), cpu_limit(0.005):
        time.sleep(10)


def test_limits_nest():
    """The inner one leaves the outer one as it was, and the outer one counts inside of it."""
    before = signal.getsignal(signal.SIGPROF), signal.getsignal(signal.SIGALRM)
    start = time.process_time()
    with pytest.raises(TimeoutException), cpu_limit(0.2):
        with pytest.raises(TimeoutException), cpu_limit(0.05):
            spin(5)
        assert time.process_time() - start < 0.15
        spin(5)
    assert 0.15 < time.process_time() - start < 0.28  # in both 0.2
    start = time.process_time()
    with pytest.raises(TimeoutException), cpu_limit(0.1), cpu_limit(50):
        spin(5)
    assert time.process_time() - start < 2
    assert (signal.getsignal(signal.SIGPROF), signal.getsignal(signal.SIGALRM)) == before
    assert signal.getitimer(signal.ITIMER_PROF)[0] == 0


def test_a_signal_that_comes_late():
    """As the block ends, and before its timers do."""
    with cpu_limit(50):
        ring = signal.getsignal(signal.SIGPROF)
        with pytest.raises(TimeoutException):
            ring(signal.SIGPROF, None)
    ring(signal.SIGPROF, None)


def test_the_limit_comes_again(monkeypatch):
    """A library may catch every exception, and go on."""
    monkeypatch.setattr(limits, "AGAIN_S", 0.05)
    with pytest.raises(TimeoutException), cpu_limit(0.05):
        with contextlib.suppress(TimeoutException):
            spin(5)
        spin(5)


def bombs() -> list[str]:
    """A hundred: towers, factorials of factorials, powers and binomials that nothing can compute."""
    found = ["9^{" * n + "9" + "}" * n for n in range(2, 22)]
    found += [f"({n}" + "!)" * 1 + "!" * 3 for n in range(4, 24)]
    found += [f"{n}^{{10^{{{n}}}}}" for n in range(9, 29)]
    found += [f"\\binom{{10^{{{n}}}}}{{3 \\cdot 10^{{{n - 1}}}}}" for n in range(9, 19)]
    found += [f"(x+1)^{{10^{{{n}}}!}}" for n in range(2, 12)]
    found += [f"\\frac{{1}}{{2^{{3^{{{n}}}}}}} + 1" for n in range(20, 30)]
    return found + [f"1e{'9' * n}" for n in range(5, 15)]


def test_bombs_end():
    """All hundred of them within 8 s of CPU time and 512 MB, and none is right."""
    assert len(bombs()) == 100
    start, memory = time.process_time(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for bomb in bombs():
        assert math.verify({"id": "t/1", "answer": "x^2+204"}, f"\\boxed{{{bomb}}}")[0] == 0.0
        assert math.verify({"id": "t/1", "answer": "204"}, f"\\boxed{{x={bomb}=204}}")[0] in (0.0, 1.0)
    assert time.process_time() - start < 8
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory < 512 << 10


def test_a_bomb_is_too_hard_to_compare():
    """By its form, not by the clock; and it still equals itself."""
    for answer, bomb in (
        ("204", "9^{9^{9^{9}}}"),
        ("204", "\\begin{pmatrix} 9^{9^{9}} \\\\ 1 \\end{pmatrix}"),
        ("x+y=204", "x+y=9^{9^{9^{9}}}"),
        ("x+y=204", "9^{9^{9^{9}}}=x+y"),
    ):
        reward, why, kind = math.verify({"id": "t/1", "answer": answer}, f"\\boxed{{{bomb}}}")
        assert (reward, kind) == (0.0, "time-out") and "TooLarge" in why
    assert math.verify({"id": "t/1", "answer": "9^{9^{9}}"}, "\\boxed{9^{9^{9}}}")[0] == 1.0
    assert math.verify({"id": "t/1", "answer": "9^{9^{9}}"}, "\\boxed{2^5}")[2] == "time-out"
