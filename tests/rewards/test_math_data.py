"""Every gold answer is right against itself and wrong against another problem's, on an own sample and on real data."""

from __future__ import annotations

import importlib.util
import json
import re
from fractions import Fraction
from pathlib import Path
from types import ModuleType

import pytest

from flowrl_mega.config import MathSettings, RewardSettings
from flowrl_mega.rewards import math
from flowrl_mega.rewards.minerva import normalise

# Of the clock: 5 s were seen to pass on a machine that others overload.
SETTINGS = RewardSettings(function="-", math=MathSettings(timeout_s=60))
TOOL = Path(__file__).parents[2] / "tools" / "math_agreement.py"
SAMPLE = Path(__file__).with_name("math_answers.txt").read_text().splitlines()

# Of each distinct answer of a file one in so many is walked in the fast tests; all of them in the integration test.
FILES = {
    "aime24": 1,
    "aime25": 1,
    "amc23": 1,
    "gsm8k_test": 1,
    "gsm8k_train": 2,
    "flowrl_train_aime": 1,
    "math500": 2,
    "olympiadbench": 4,
    "flowrl_train_math": 8,
}
# Answers that cannot be graded, by file and line (from 0), with the fault that `check_gold` names. All others can.
FAULTS = {("flowrl_train_math", 5328): "is empty"}


@pytest.fixture
def golds(request):
    """Gives the gold answers of a file of the data folder, or skips."""
    folder = request.config.getoption("--data")

    def read(name: str) -> list[str]:
        if folder is None or not (path := Path(folder) / f"{name}.jsonl").exists():
            pytest.skip(f"no {name}.jsonl: give the data folder, make test DATA=DIR")
        with path.open() as lines:  # splitlines would also split at separators inside of strings
            return [json.loads(line)["answer"] for line in lines]

    return read


def number(answer: str) -> Fraction | None:
    """The number that an answer is, unit and signs left out; None if it is no plain number. Independent of the rules:
    with it alone two answers that differ as strings are taken as equal."""
    plain = re.sub(
        r"\\text\s*\{[^{}]*\}|\\[$%!]|\^\\circ|\^\{\\circ\}|[$,{}\s]", "", answer.replace("\\dfrac", "\\frac")
    )
    fraction = re.fullmatch(r"(-?)\\frac(?:(\d)(\d)|\{(\d+)\}\{(\d+)\})", re.sub(r"[$,\s]|\\!", "", answer))
    if fraction:
        top, bottom = (int(part) for part in fraction.groups()[1:] if part)
        return Fraction(-top if fraction[1] else top, bottom) if bottom else None
    return Fraction(plain) if re.fullmatch(r"-?\d*\.?\d+(?:/[1-9]\d*)?", plain) and "./" not in plain else None


def another(answers: list[str], i: int) -> str:
    """The next problem's answer that differs, as a normalised string and as a number."""
    own, value = normalise(answers[i]), number(answers[i])
    for j in range(i + 1, i + len(answers)):
        other = answers[j % len(answers)]
        if other.strip() and normalise(other) != own and (value is None or number(other) != value):
            return other
    raise AssertionError("all answers are equal")


@pytest.fixture(scope="module")
def tool() -> ModuleType:
    """tools/math_agreement.py, which is no part of the package."""
    spec = importlib.util.spec_from_file_location("math_agreement", TOOL)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def walk(name: str, answers: list[str], step: int = 1) -> list[str]:
    """What is wrong with the verdicts on every step-th distinct answer."""
    distinct = [i for i, answer in enumerate(answers) if answers.index(answer) == i]
    wrong = []
    for i in distinct[::step]:
        row = {"id": f"{name}/{i}", "answer": answers[i]}
        if (name, i) in FAULTS:
            fault = math.check_gold(answers[i], 60)
            wrong += [] if fault == FAULTS[name, i] else [f"{row}: check_gold says {fault!r}"]
            continue
        other = another(answers, i)
        verdicts = {
            "check_gold": (math.check_gold(answers[i], 60), None),
            "verify, itself": (math.verify(row, f"So it is $\\boxed{{{answers[i]}}}$.", SETTINGS)[2], "right"),
            "verify, in a line": (math.verify(row, f"Answer: {answers[i]}", SETTINGS)[2], "right"),
            "dapo, itself": (math.dapo(row, f"So.\nAnswer: {answers[i]}")[2], "right"),
            f"verify, {other}": (math.verify(row, f"\\boxed{{{other}}}", SETTINGS)[2], "wrong"),
            f"dapo, {other}": (math.dapo(row, f"Answer: {other}")[2], "wrong"),
        }
        wrong += [f"{row} {how}: {got!r}" for how, (got, wanted) in verdicts.items() if got != wanted]
    return wrong


def test_the_own_sample():
    """Kinds of answers as the data sets have them; it needs no data folder."""
    assert walk("sample", SAMPLE) == []


def test_the_independent_numbers():
    """What excuses a neighbour from being wrong must itself be right."""
    assert [number(text) for text in ("27.0", "1,234", "25\\%", "21\\text{ dogs}")] == [27, 1234, 25, 21]
    assert number("-\\frac{1}{2}") == number("-.5") == number("-1/2") == Fraction(-1, 2)
    assert [number(text) for text in ("x", "\\frac{\\pi}{2}", "1,2,3x", "52_8", "2^3", "1/0")] == [None] * 6


@pytest.mark.parametrize("name", FILES)
def test_a_sample_of_real_answers(golds, name):
    """The integration test walks all of them."""
    assert walk(name, golds(name), FILES[name]) == []


@pytest.mark.integration
@pytest.mark.parametrize("name", FILES)
def test_all_real_answers(golds, name):
    """Every distinct answer of every file, none left out but those that FAULTS lists."""
    assert walk(name, golds(name)) == []


@pytest.mark.parametrize(("name", "line"), FAULTS)
def test_the_listed_faults_are_there(golds, name, line):
    """Each excuse names a row that really has the fault, so that the list cannot hide others."""
    assert math.check_gold(golds(name)[line]) == FAULTS[name, line]


@pytest.mark.parametrize(
    ("answer", "rewritten"),
    [
        ("27.0", "27"),
        ("\\frac{1}{2}", "\\dfrac{1}{2}"),
        ("x=5", "5"),
        ("$2 n$", "2 n"),
        ("\\$18.90", "18.90"),
        ("90^\\circ", "90"),
        ("70 \\text{ m/s}", "70"),
        ("p - q", "p - q"),
    ],
)
def test_rewriting(tool, answer, rewritten):
    """As models write it, by hand; the next test and the table in docs/rewards.md rest on it."""
    assert tool.rewrite(answer) == rewritten


@pytest.mark.parametrize("name", ["amc23", "math500", "olympiadbench", "flowrl_train_math"])
def test_rewritten_answers_are_right(golds, tool, name):
    """These differ from the gold answer as strings, so that here the algebra must find them equal."""
    answers = list(dict.fromkeys(golds(name)))[:: FILES[name]]
    changed = [(gold, given) for gold in answers if gold and (given := tool.rewrite(gold)) != gold]
    assert len(changed) >= 20
    graded = [math.verify({"id": name, "answer": gold}, f"\\boxed{{{given}}}", SETTINGS) for gold, given in changed]
    assert [why for reward, why, _ in graded if reward != 1.0] == []


@pytest.mark.slow
def test_the_agreement_table(tool, tmp_path, capsys, monkeypatch):
    """Counted by hand: 27.0 rewritten as 27 is right for math-verify only; an answer that is empty is left out."""
    (tmp_path / "amc23.jsonl").write_text('{"answer": "27.0"}\n{"answer": ""}\n{"answer": "5"}\n{"answer": "5"}\n')
    monkeypatch.setattr("sys.argv", ["math_agreement.py", "--data", str(tmp_path)])
    tool.main()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in capsys.readouterr().out.splitlines()]
    counts = {(name, form): list(map(int, cells)) for name, form, *cells in rows[2:] if len(cells) == 5}
    assert counts["amc23 (2)", "itself"] == [2, 2, 0, 0, 0]
    assert counts["amc23 (2)", "rewritten"] == [1, 0, 0, 0, 1]
    assert counts["amc23 (2)", "another's"] == [2, 0, 2, 0, 0]
    assert counts["table of pairs", "equal"][0] + counts["table of pairs", "not equal"][0] == 210
    assert ["math500", "no file"] in rows
