"""DAPO's rule against verl's, math-verify against a table of pairs, and responses that try to break or to cheat."""

from __future__ import annotations

import importlib.util
import random
import re
import threading
import time
from pathlib import Path
from types import ModuleType

import math_verify
import pytest
import sympy

from flowrl_mega.config import MathSettings, RewardSettings
from flowrl_mega.rewards import math, minerva
from flowrl_mega.rewards.final_answer import final_answer
from flowrl_mega.rewards.overlong import overlong_penalty

# Of the clock: 5 s were seen to pass on a machine that others overload.
SETTINGS = RewardSettings(function="-", math=MathSettings(timeout_s=60))
HASTY = RewardSettings(function="-", math=MathSettings(timeout_s=1))
TABLE = Path(__file__).with_name("math_pairs.tsv")
PAIRS = [line.split("\t") for line in TABLE.read_text().splitlines() if not line.startswith("#")]


def plain_integer(text: str) -> tuple[str, ...] | None:
    """An integer's sign and digits without leading zeros, None for anything else."""
    found = re.fullmatch("(-?)0*([0-9]+)", text)
    return found.groups() if found else None


def verls(rule: ModuleType, response: str, gold: str) -> float:
    """verl's verdict; where it is wrong for leading zeros alone, what it would be without them."""
    result = rule.compute_score(response, gold)
    in_a_line = re.search(r"(?i)Answer\s*:\s*[^\n]", response[-300:])  # else a box, which is compared literally
    right = plain_integer(rule.normalize_final_answer(gold) if in_a_line else gold)
    given = plain_integer(result["pred"] or "")
    return 1.0 if given is not None and given == right else result["score"]


@pytest.fixture(scope="module")
def verl_rule() -> ModuleType:
    """verl's file alone: importing the package would want ray, of which this file uses nothing."""
    verl = importlib.util.find_spec("verl")
    path = Path(verl.submodule_search_locations[0]) / "utils/reward_score/math_dapo.py"
    spec = importlib.util.spec_from_file_location("verl_math_dapo", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def dapo(gold: str, response: str) -> float:
    return math.dapo({"id": "t/1", "answer": gold}, response)[0]


def verify(gold: str, response: str, settings: RewardSettings = SETTINGS) -> tuple[float, str, str]:
    return math.verify({"id": "t/1", "answer": gold}, response, settings)


def test_the_table_is_large_and_complete():
    """210 pairs, each decided by hand; a missing tab would shift a verdict into a note."""
    assert all(len(pair) == 5 and pair[2] in ("yes", "no") for pair in PAIRS)
    assert len(PAIRS) == len({(gold, given) for gold, given, *_ in PAIRS}) == 210
    assert min(sum(pair[2] == equal for pair in PAIRS) for equal in ("yes", "no")) > 60


@pytest.mark.parametrize(("gold", "given", "equal", "limits", "note"), PAIRS, ids=[f"{p[0]}~{p[1]}" for p in PAIRS])
def test_pairs(gold, given, equal, limits, note):
    """Both rules agree with the mathematician but for the limits that the table lists, in both forms of answer."""
    equal = equal == "yes"
    assert (dapo(gold, f"Thus.\nAnswer: {given}") == 1.0) == (equal != ("dapo" in limits))
    expected = equal != ("verify" in limits)
    assert (verify(gold, f"Thus $\\boxed{{{given}}}$.")[0] == 1.0) == expected
    if "\\boxed" not in given:
        assert (verify(gold, f"Thus.\nAnswer: {given}")[0] == 1.0) == expected


RESPONSES = (
    """
Answer: 7|answer : 7|ANSWER:7|Answer:\n7|Answer: 6\nAnswer: 7|Answer: 7\nAnswer: 6|The answer is 7|7||Answer:
\\boxed{7}|\\boxed{6} \\boxed{7}|Answer: \\boxed{7}|\\boxed{7} Answer: 6|Answer: 6 \\boxed{7}|\\boxed{7|\\boxed{{7}}
\\boxed 7|Answer: $7$|Answer: **7**|Answer: x=7|Answer: 7 = x|Answer: 7.|\\fbox{7}|\\boxed{ 7 }|\\boxed{\\{7}|Answer: 7}
""".strip()
    .replace("\n\\", "|\\")
    .split("|")
)


@pytest.mark.parametrize("pad", [0, *range(87, 95), *range(286, 295), 400])
def test_dapo_extracts_what_verl_extracts(verl_rule, pad):
    """Also at the edges of the last 300 characters, and of the last 100 for a box."""
    for response in RESPONSES:
        response = f"First. {response}{' ' * pad}"
        assert dapo("7", response) == verl_rule.compute_score(response, "7")["score"], response


def test_dapo_gives_verls_verdict_on_every_pair(verl_rule):
    """The normal form, with real LaTeX in it, in an answer line and in a box."""
    for gold, given in [*(pair[:2] for pair in PAIRS), ("1²", "1,²"), ("a", "aa "), ("\\frac12", "\\fracab")]:
        for response in (f"Answer: {given}", f"\\boxed{{{given}}}", given):
            assert dapo(gold, response) == verls(verl_rule, response, gold), (gold, response)


def test_the_normal_form_removes_what_verl_removes(verl_rule):
    """In verl's order."""
    assert minerva.SUBSTITUTIONS == verl_rule.SUBSTITUTIONS
    assert minerva.REMOVED == verl_rule.REMOVED_EXPRESSIONS


def test_dapo_gives_verls_verdict_on_noise(verl_rule):
    """Pieces of what the rule looks for, in any order: 4000 responses, with gold answers made of the same pieces."""
    pieces = (
        r"Answer: |answer :|\boxed{|{|}|\frac|12|\sqrt|$|\text{|a |an | |1,234|=|\$|.$|mbox|units|\ldots|^\circ|{,}"
    )
    pieces = [*pieces.split("|"), *r",\!|\;|\text{m}|,\text{and}|x|27.0|27|\overline{|\textbf{|\ |²|٣|,|é".split("|")]
    pieces += ["\n", "\r", "\0", '"', "\x85"]
    rng = random.Random(0)
    right = 0
    for _ in range(4000):
        gold = "".join(rng.choices(pieces, k=rng.randrange(5)))
        response = "".join(rng.choices(pieces, k=rng.choice([1, 4, 20, 120])))
        response += rng.choice(["", f"Answer: {gold}", f"\\boxed{{{gold}}}"])
        reward = dapo(gold, response)
        assert reward == verls(verl_rule, response, gold), (gold, response)
        right += reward == 1.0
    assert 400 < right < 3600  # else the noise would test one verdict only


def test_verify_needs_no_settings():
    """As people call it from a notebook: the defaults of `reward.math`."""
    assert math.verify({"answer": "\\frac{1}{2}"}, "\\boxed{0.5}") == (1.0, "right: 0.5", "right")


def test_results_say_what_was_read_and_what_was_right():
    """They go to samples.jsonl, and their kinds to the metrics."""
    row = {"id": "t/1", "answer": "\\frac{1}{2}"}
    assert math.dapo(row, "Answer: $1/2$") == (-1.0, "1/2, not \\frac{1}{2}", "wrong")
    assert math.dapo(row, "I think 1/2") == (-1.0, "no 'Answer:' in the last 300 characters", "no answer")
    assert math.verify(row, "\\boxed{0.5}", SETTINGS) == (1.0, "right: 0.5", "right")
    assert math.verify(row, "Answer: 0.6", SETTINGS) == (0.0, "0.6, not \\frac{1}{2}", "wrong")
    assert math.verify(row, "I think 1/2", SETTINGS) == (0.0, "no \\boxed{} and no 'Answer:'", "no answer")
    assert math.dapo.wrong == -1.0  # what a failed call scores


def test_reasons_are_short():
    """One line each."""
    for given, shown in (("9" * 80, "9" * 80), ("9" * 81, "9" * 77 + "..."), ("x + \n  1", "x + 1")):
        assert math.verify({"answer": "5"}, f"\\boxed{{{given}}}", SETTINGS)[1] == f"{shown}, not 5"


@pytest.mark.parametrize(
    ("response", "answer"),
    [
        ("So \\boxed{1}, no: \\boxed{2}", "2"),
        ("\\boxed{1} or \\boxed{2}", "1, 2"),
        ("$\\boxed{1}$, $\\boxed{2}$, and $\\boxed{3}$.", "1, 2, 3"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed{\\{1,2\\}}", "\\{1,2\\}"),
        ("\\boxed{\\left\\{ x \\right.}", "\\left\\{ x \\right."),
        ("\\boxed{x = \\boxed{3}}", "3"),
        ("\\boxed{4} ... \\boxed{5", "4"),  # cut off
        ("\\boxed{4}\nAnswer: 5", "4"),
        ("Answer: 4\nAnswer: 5", "5"),
        ("**Answer:** 5", "5"),
        ("**Answer**: 5", "5"),
        ("#### 18", "18"),
        ("The answer is 3.5. I am sure.", "3.5"),
        ("The answer is 3\nAnswer: 4\nSo the answer is 5", "4"),
        ("It is 5", None),
        ("1 + 1 = 2, $x = 5$", None),
        ("\\boxed{5", None),
        ("}}}", None),
        ("", None),
    ],
)
def test_the_final_answer(response, answer):
    """One answer a response: what it says last in the strongest form that it uses."""
    assert final_answer(response) == answer


@pytest.mark.parametrize(
    "response",
    [
        "\\boxed{1} or \\boxed{2}",
        "\\boxed{1}, \\boxed{2}, \\boxed{3}",
        "\\boxed{1, 2, 3}",
        "\\boxed{1 \\text{ or } 2}",
        "\\boxed{1; 2}",
        "\\boxed{2 \\pm 0, 1}",
        "\\boxed{x = 1, x = 2}",
        "\\boxed{x = 1 \\text{ or } x = 2}",
        "\\boxed{2 \\text{ or another number}, 3}",
        "\\boxed{[0, 2]}",
        "\\boxed{x \\ge 2}",
        "\\boxed{x \\in \\{1, 2\\}}",
        "\\boxed{\\mathbb{R}}",
        "\\boxed{x}",
        "\\boxed{}",
        "Answer: 1, 2 or 3",
        "Answer: $1$ or $2$",
        "Answer: 1 or 2 (one of them)",
        "Answer: 2, 1\nAnswer: 2, 3",
        "1 2 3 4 5",
        "Let me count: $1$, $2$",
        "Answer: 1} and \\boxed{2",
    ],
)
def test_candidates_are_no_answer(response):
    """Gold 2: who lists candidates, or never commits, must not be paid for the right one among them."""
    assert verify("2", response)[0] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize(
    "response",
    [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^9)!}", r"\boxed{\sum_{k=1}^{10^{9}} \frac{1}{k^2+k+1}}"],
)
def test_what_takes_too_long_is_wrong(response):
    """Real ones, that math-verify does not finish in minutes. The clock is given room for a loaded machine."""
    start = time.process_time()
    reward, why, kind = verify("204", response, HASTY)
    assert (reward, kind) == (0.0, "time-out") and "too hard to compare" in why
    assert time.process_time() - start < 6


@pytest.mark.parametrize("error", [RecursionError, MemoryError])
@pytest.mark.parametrize("where", [(math_verify, "verify"), (math_verify, "parse"), (sympy, "N")])
def test_a_crash_is_wrong(monkeypatch, error, where):
    """Neither is an exception to the caller: the answer of a model brought it about."""
    assert verify("y^2", "\\boxed{z^3}")[2] == "wrong"
    monkeypatch.setattr(*where, lambda *_, **__: (_ for _ in ()).throw(error("too much")))
    assert verify("y^2", f"\\boxed{{y+y^2-y+{error.__name__.lower()[:3]}-{where[1]}}}")[::2] == (0.0, "time-out")


HOSTILE = {
    "deep boxes": "\\boxed{" * 20000 + "1" + "}" * 20000,
    "open boxes": "\\boxed{" * 50000,
    "closed": "}" * 100_000,
    "deep braces": "\\boxed{" + "{" * 400 + "1" + "}" * 400 + "}",
    "deep parentheses": "\\boxed{" + "(" * 490 + "1" + ")" * 490 + "}",
    "minus": "\\boxed{" + "-" * 900 + "1}",
    "long number": "\\boxed{" + "1" * 1_000_000 + "}",
    "long sum": "Answer: " + "1+" * 300_000,
    "many answers": "Answer:" * 50000,
    "spaces": "Answer" + " " * 200_000,
    "list": "\\boxed{1}," * 20000,
    "null": "\\boxed{\0}\0",
    "surrogate": "Answer: \ud800",
    "emoji": "\\boxed{😀=😀}",
    "division": "\\boxed{\\frac{1}{0}}",
    "words": "\\boxed{" + "a-" * 490 + "1}",
    "fractions": "\\boxed{" + "\\frac{1}{" * 40 + "2" + "}" * 40 + "}",
    "factorials": "\\boxed{9" + "!" * 12 + "}",
    "float": "\\boxed{10.0^{10^{8}}}",
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_responses_end_and_are_wrong(name):
    """A response is whatever a model writes. Parsing and comparing have a second each."""
    start = time.process_time()
    reward, _, kind = verify("204", HOSTILE[name], HASTY)
    assert reward == 0.0 and kind in ("wrong", "no answer", "time-out")
    assert dapo("204", HOSTILE[name]) == -1.0
    assert time.process_time() - start < 6


@pytest.mark.slow
def test_noise_never_raises():
    """Formulas cut and glued at random, in a box and in a line; each verdict is a verdict."""
    rng = random.Random(1)
    text = "".join(given for _, given, *_ in PAIRS) + "\0\t\\\"'~`@#&_^é中😀{}{}[]()"
    for _ in range(150):
        start = rng.randrange(len(text) - 30)
        given = "".join(rng.choices(text, k=rng.randrange(8))) + text[start : start + rng.randrange(30)]
        for response in (f"\\boxed{{{given}}}", f"Answer: {given}"):
            reward, why, kind = verify("x^2+1", response, HASTY)
            assert reward == 0.0 and kind in ("wrong", "no answer", "time-out"), (response, why)


def test_in_a_thread_it_refuses():
    """Signals reach the main thread only: without them one hard answer would hold a worker for hours."""
    caught = []

    def call() -> None:
        with pytest.raises(RuntimeError, match="main thread") as error:
            verify("2", "\\boxed{2}")
        caught.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    thread.join()
    assert caught


@pytest.mark.parametrize(
    ("answer", "fault"),
    [
        ("", "is empty"),
        (" \n", "is empty"),
        ("}{", "its braces do not match"),
        ("42}", "its braces do not match"),
        ("\\text{}", "cannot parse it"),
        ("1" * 1001, "longer than 1000"),
    ],
)
def test_a_gold_answer_that_cannot_be_read_is_named(answer, fault):
    """Else every response to that prompt would be wrong without a word."""
    with pytest.raises(ValueError, match=f"row 't/1': answer .*{fault}.*; correct or drop the row"):
        verify(answer, "\\boxed{1}")
    assert fault in math.check_gold(answer) and ("braces" in fault) == ("braces" in math.check_gold(answer))


@pytest.mark.slow
def test_check_gold_passes_what_can_be_graded():
    """And finds what takes too long before a run does. A value that cannot be computed still equals itself."""
    assert [math.check_gold(gold) for gold in ("27", "\\text{east}", "$69$,$84$", "\\frac{1}{0}")] == [None] * 4
    assert math.check_gold("9^{9^{9^{9}}}", 1) is None
    assert "within 1 s" in math.check_gold("(" * 490 + "1" + ")" * 490, 1)


@pytest.mark.parametrize("row", [{"id": "t/2"}, {"id": "t/2", "answer": 27}, {"id": "t/2", "answer": None}])
def test_a_row_without_a_string_answer_is_named(row):
    """27 and "27" would be different answers to a match of strings."""
    for call in (lambda: math.dapo(row, "Answer: 27"), lambda: math.verify(row, "Answer: 27", SETTINGS)):
        with pytest.raises(ValueError, match="row 't/2': a math row needs 'answer', a string"):
            call()


def test_a_gold_answer_is_parsed_once(monkeypatch):
    """Each prompt is graded G times a step, and parsing is most of the work."""
    parsed = []
    parse = math_verify.parse
    monkeypatch.setattr(math_verify, "parse", lambda text, *a, **k: parsed.append(text) or parse(text, *a, **k))
    for i in range(3):
        verify("\\frac{355q}{113}", f"\\boxed{{q+{i}}}")
    assert parsed.count("\\boxed{\\frac{355q}{113}}") == 1 and len(parsed) == 4


@pytest.mark.parametrize("length", [0, 1, 16383, 16384, 16385, 18432, 20479, 20480, 20481, 10**6])
@pytest.mark.parametrize("penalty", [1.0, 0.5])
def test_the_overlong_penalty_is_dapos_equation_13(length, penalty):
    """As it stands in arXiv 2503.14476, with the paper's L_max and L_cache."""
    l_max, l_cache = 20480, 4096
    if length <= l_max - l_cache:
        expected = 0.0
    elif length <= l_max:
        expected = ((l_max - l_cache) - length) / l_cache
    else:
        expected = -1.0
    assert overlong_penalty(length, l_max, l_cache, penalty) == penalty * expected
