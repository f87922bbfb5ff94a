"""Each recipe on problems of our own in the raw form of its data set (samples/), against rows written by hand."""

import base64
import json
import pickle
import random
import zlib
from pathlib import Path

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare.code_recipes import check_tests, unpack
from flowrl_mega.data.prepare.problem import BadRow, last_boxed, without_wording
from flowrl_mega.data.prepare.recipes import RECIPES, recipe

SAMPLES = Path(__file__).parent / "samples"


def samples(name):
    return [json.loads(line) for line in (SAMPLES / f"{name}.jsonl").read_text().splitlines()]


def made(name, wording=None):
    chosen = recipe(name.partition("-")[0] if name.startswith("deepcoder") else name)
    return [chosen.make(record, wording or chosen.wording) for record in samples(name)]


@pytest.mark.parametrize(
    ("name", "text", "answer"),
    [
        ("deepscaler", "What is half of a quarter?", r"\frac{1}{8}"),
        ("math", "Write $0.75$ as a fraction.", r"\frac{3}{4}"),
        ("gsm8k", "Ada has 1,100 stamps and buys 100 more. How many has she now?", "1200"),
        ("aime24", "Find the sum of the digits of $2^{10}$.", "7"),
        ("aime25", "Find the number of primes below $20$.", "8"),
        ("amc23", "How many miles does a train at 54 miles per hour go in 30 minutes?", "27"),
        ("math500", "Convert $(0,2)$ to polar coordinates.", r"\left( 2, \frac{\pi}{2} \right)"),
        ("minerva", "What is the energy in eV of a photon of 620 nm, to one digit?", "2"),
        ("olympiadbench", "Find all real $x$ with $x^2 = 9$.", "3, -3"),
    ],
)
def test_math(name, text, answer):
    """The problem, how to answer it, and the answer that is graded."""
    first = recipe(name).make(samples(name)[0], "boxed")
    assert first.text == text
    prompt = f"{text}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    assert first.row == {"prompt": prompt, "kind": "math", "answer": answer}
    assert recipe(name).make({"problem": text, "answer": answer, "source": "x"}, "boxed") == first, "the uniform form"


def test_dapo_s_prompt_is_the_published_one_to_the_letter():
    """Its rule asks for "Answer:", so the prompt must; other wordings take the problem out of it."""
    for problem, record in zip(made("dapo-math-17k"), samples("dapo-math-17k"), strict=True):
        assert problem.row["prompt"] == record["prompt"][0]["content"]
        assert problem.row["kind"] == "math_dapo"
        assert problem.row["answer"] == record["reward_model"]["ground_truth"]
    assert made("dapo-math-17k", "boxed")[1].row["prompt"].startswith("A box holds 34 marbles and 9 more.")
    assert without_wording(made("dapo-math-17k", "boxed")[1].row["prompt"]) == made("dapo-math-17k")[1].text


def test_olympiadbench_s_context_and_pictures():
    first, second, third = samples("olympiadbench")
    make = recipe("olympiadbench").make
    assert make(second, "boxed").text == "Let $f(x) = 2x$.\n\nFind $f(1)$."
    with pytest.raises(BadRow, match="has a picture"):
        make(third, "boxed")
    with pytest.raises(BadRow, match="at least one answer"):
        make({**first, "final_answer": []}, "boxed")


def test_numbers_that_are_integers():
    """amc23 says 27.0; 2.5 and 1e3 stay as they are."""
    for given, expected in ((27.0, "27"), ("27.0", "27"), ("-3.00", "-3"), (2.5, "2.5"), ("1.05", "1.05"), (12, "12")):
        assert recipe("amc23").make({"question": "x", "answer": given}, "boxed").row["answer"] == expected


def test_the_last_box():
    assert last_boxed(r"\boxed{1} and \boxed{\frac{1}{\sqrt{2}}}.") == r"\frac{1}{\sqrt{2}}"
    for text in ("", "no box", r"\boxed{1", r"\boxed"):
        with pytest.raises(BadRow):
            last_boxed(text)


STDIN, CALL = {"type": "stdin"}, {"type": "call"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        (
            "deepcoder-taco",
            [
                STDIN | {"inputs": ["1 2\n", "3\n4"], "outputs": ["3\n", "7\n"]},
                CALL | {"name": "Solution.size", "inputs": [[[1, 2]], [[]]], "outputs": [2, 0]},
            ],
        ),
        (
            "deepcoder-primeintellect",
            [
                STDIN | {"inputs": ["a\n"], "outputs": ["a\na\n"]},
                CALL | {"name": "double", "inputs": [[2], [0]], "outputs": [4, 0]},
            ],
        ),
        (
            "deepcoder-lcbv5",
            [
                CALL | {"name": "Solution.total", "inputs": [[[1, 2], 3]], "outputs": [9]},
                STDIN | {"inputs": [""], "outputs": ["yes\n"]},
            ],
        ),
        ("deepcoder-codeforces", [STDIN | {"inputs": ["1 5\n"], "outputs": ["5\n"]}]),
        (
            "livecodebench",
            [
                CALL | {"name": "Solution.add", "inputs": [[[1, 2], 1], [[5], 1]], "outputs": [[2, 3], [6]]},
                STDIN | {"inputs": ["1 2\n", "4 4\n"], "outputs": ["3\n", "8\n"]},
            ],
        ),
    ],
)
def test_code(name, expected):
    """Every published form of tests becomes one of ours; public and private tests both count."""
    problems = made(name)
    assert [problem.row["tests"] for problem in problems] == expected
    assert {problem.row["kind"] for problem in problems} == {"code"}
    for problem, record in zip(problems, samples(name), strict=True):
        assert problem.text in problem.row["prompt"]
        assert (record.get("starter_code") or "").strip() in problem.row["prompt"]


@pytest.mark.parametrize("name", ["humaneval", "humaneval+"])
def test_humaneval_s_tests_pass_its_own_solution(name):
    """The oracle is Python: stub and solution together define the function, and check() of it raises nothing."""
    (problem,), (record,) = made(name), samples(name)
    tests = problem.row["tests"]
    assert (tests["type"], tests["name"]) == ("check", "square")
    exec(tests["stub"] + record["canonical_solution"] + "\n" + tests["code"], space := {})
    space["check"](space[tests["name"]])
    with pytest.raises(AssertionError):
        space["check"](lambda n: n + n + 1)
    assert "def square(n: int) -> int:" in problem.row["prompt"]


def test_own_rows():
    """What a reward of one's own reads stays; an answer is text, as the math rewards want it."""
    first, second = made("rows")
    assert first.row == samples("rows")[0] | {"answer": "4"}
    assert first.text == "Be short.\n\n2+2=?"
    assert second.row == samples("rows")[1]


class Evil:
    def __reduce__(self):
        return (print, ("a pickle of the data set has run code",))


@pytest.mark.parametrize("value", [Evil(), ["x"], ("x",), b"[]", {"a": Evil()}, 3, None])
def test_packed_tests_run_nothing(value, capsys):
    """A data set is not trusted: of a pickle nothing but one text is taken."""
    with pytest.raises(BadRow):
        unpack(base64.b64encode(zlib.compress(pickle.dumps(value))).decode())
    assert capsys.readouterr().out == ""


def test_packed_tests_of_every_protocol():
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        packed = base64.b64encode(zlib.compress(pickle.dumps('[{"input": "é"}]', protocol))).decode()
        assert unpack(packed) == '[{"input": "é"}]'


def test_damaged_packed_tests():
    """Bytes that are changed, cut off or no pickle at all: refused or read, and nothing else happens."""
    draw, refused = random.Random(0), 0
    for _ in range(2000):
        raw = bytearray(pickle.dumps('[{"input": "x"}]', draw.randint(0, 5)))
        for _ in range(draw.randint(0, 3)):
            raw[draw.randrange(len(raw))] = draw.randrange(256)
        raw = draw.choice([raw, raw[: draw.randrange(len(raw))], draw.randbytes(20)])
        try:
            assert isinstance(unpack(base64.b64encode(zlib.compress(bytes(raw))).decode()), str)
        except BadRow:
            refused += 1
    assert 1000 < refused < 2000
    for packed in ("", "é", "gAN4", "====", "eJw="):
        with pytest.raises(BadRow):
            unpack(packed)


def test_a_bomb_is_not_unpacked(monkeypatch):
    monkeypatch.setattr("flowrl_mega.data.prepare.code_recipes.MOST_BYTES", 1000)
    with pytest.raises(BadRow, match="too large"):
        unpack(base64.b64encode(zlib.compress(pickle.dumps("x" * 5000))).decode())


@pytest.mark.parametrize(
    "tests",
    [
        None,
        {},
        {"type": "shell"},
        {"type": "stdin", "inputs": ["1"], "outputs": []},
        {"type": "stdin", "inputs": [], "outputs": []},
        {"type": "stdin", "inputs": [1], "outputs": ["1"]},
        {"type": "call", "name": "f", "inputs": [1], "outputs": [1]},
        {"type": "call", "name": "f(", "inputs": [[1]], "outputs": [1]},
        {"type": "call", "name": "a.b.c", "inputs": [[1]], "outputs": [1]},
        {"type": "check", "name": "f", "code": "def check(c: pass", "stub": ""},
        {"type": "check", "name": "f", "code": "x = 1", "stub": ""},
        {"type": "check", "name": "f", "code": "def check(c): pass"},
        {"type": "check", "name": "f", "stub": ""},
        {"type": "check", "name": "f", "code": "(" * 5000, "stub": ""},
        {"type": "check", "name": "f", "code": "\x00", "stub": ""},
    ],
)
def test_bad_tests(tests):
    """Tests that cannot be run would score every program as wrong."""
    with pytest.raises(BadRow) as caught:
        check_tests(tests)
    assert caught.value.reason == "bad tests"


@pytest.mark.parametrize("name", [name for name in RECIPES if name != "rows"])
def test_a_missing_column_is_named(name):
    with pytest.raises(BadRow, match=r"has no '\w+'.*\(it has: 'foo'\); name the column with --columns"):
        recipe(name).make({"foo": 1}, "boxed")


@pytest.mark.parametrize(
    ("name", "near"),
    [("gsm8", "gsm8k"), ("MATH-500", "math500"), ("human-eval", "humaneval"), ("reasoning_gym", "gym")],
)
def test_an_unknown_recipe_gets_the_nearest_name(name, near):
    with pytest.raises(ConfigError, match=f"--recipe {name}: unknown; did you mean '.*{near}'"):
        recipe(name)
