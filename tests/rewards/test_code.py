"""Code rewards: where the program of a response is, and the verdicts of the forms of tests, in the real sandbox."""

from __future__ import annotations

import json

import pytest

from flowrl_mega.config import CodeSettings, RewardSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.code.judge import same, same_output
from flowrl_mega.rewards.sandbox import codec

FAST = RewardSettings(
    function="-", code=CodeSettings(isolation="process", wall_s=60.0, cpu_s=2, memory_mb=128, output_kb=64)
)
SHARE = FAST.model_copy(update={"code": FAST.code.model_copy(update={"score": "fraction"})})
SUM = {"type": "stdin", "inputs": ["1 2\n", "30 12\n", "-1 1\n"], "outputs": ["3\n", "42\n", "0\n"]}
TWICE = {"type": "call", "name": "twice", "inputs": [[1], [[1, 2]], ["ab"]], "outputs": [2, [1, 2, 1, 2], "abab"]}
STUB = 'from math import floor\n\n\ndef half(n: int) -> int:\n    """Half of n, rounded down."""\n'
CHECK = {"type": "check", "name": "half", "stub": STUB, "code": "def check(candidate):\n    assert candidate(7) == 3\n"}


def fenced(source, language="python"):
    return f"Some thoughts.\n```{language}\n{source}\n```\nDone."


def scored(tests, response, settings=FAST):
    return code.score({"tests": tests}, response, settings)


def assert_verdict(tests, source, reward, share, kind, words):
    """All or nothing, with the reason; and the share of the tests where that is asked for."""
    result = scored(tests, fenced(source))
    assert (result[0], result[2]) == (reward, kind), result[1]
    assert words in result[1]
    assert scored(tests, fenced(source), SHARE)[0] == pytest.approx(share)


def test_score_needs_no_settings():
    """As people call it from a notebook: the defaults of `reward.code`."""
    assert code.score({"tests": TWICE}, "no program here") == (0.0, "no ```python block", "no code")
    assert code.score({"tests": TWICE}, fenced("def twice(x):\n    return 2 * x"))[::2] == (1.0, "right")


# Stubs


def test_a_completion_without_a_fence():
    """What a base model writes after a HumanEval prompt."""
    assert scored(CHECK, "    return floor(n / 2)\n")[::2] == (1.0, "right")
    assert scored(CHECK, "    return n\n")[::2] == (0.0, "wrong")
    assert scored(CHECK, "   \n")[2] == "no code"


@pytest.mark.parametrize(
    "source",
    [
        "def half(n):\n    return floor(n / 2)",  # the stub's imports are its own
        STUB + "    return n // 2",
        "    return n // 2",
        "def helper(n):\n    return n // 2\n\n\nhalf = helper\n\n\ndef half(n):\n    return helper(n)",
    ],
)
def test_a_fenced_answer_to_a_stub(source):
    """The whole function, the prompt and its completion, or the completion alone."""
    assert scored(CHECK, fenced(source))[0] == 1.0


@pytest.mark.parametrize(
    "stub",
    [
        "def f(x):\n",
        "def f(x):",
        "import math\n\n\nclass A:\n    x = 2\n\n\ndef f(x):\n    # Twice x.\n",
        "@cache\ndef f(\n    x,\n):\n",
    ],
)
def test_a_stub_without_a_docstring(stub):
    """A bare signature, where the problem's text stands in the prompt alone."""
    stub = stub.replace("@cache", "from functools import cache\n\n\n@cache")
    tests = {
        "type": "check",
        "name": "f",
        "stub": stub,
        "code": "def check(candidate):\n    assert candidate(3) == 6\n",
    }
    for factor, reward in ((2, 1.0), (3, 0.0)):
        assert scored(tests, fenced(f"def f(x):\n    return x * {factor}"))[0] == reward
        assert scored(tests, f"    return x * {factor}\n")[0] == reward


# Programs that read and write


@pytest.mark.parametrize(
    "source, reward, share, kind, words",
    [
        ("a, b = map(int, input().split())\nprint(a + b)", 1.0, 1.0, "right", "passes 3"),
        ("print(3)", 0.0, 1 / 3, "wrong", "test 2 of 3: expected '42', got '3'"),
        ("a, b = map(int, input().split())\nprint(a + b, '', sep='  \\n\\n')", 1.0, 1.0, "right", "passes"),
        ("a, b = map(int, input().split())\nprint(float(a + b))", 1.0, 1.0, "right", "passes"),
        ("a, b = map(int, input().split())\nprint(a + b + 1e-9)", 0.0, 0.0, "wrong", "expected '3'"),
        ("import sys\nprint(sum(map(int, sys.stdin.read().split())))", 1.0, 1.0, "right", "passes"),
        ("print(eval('+'.join(open(0).read().split())))", 1.0, 1.0, "right", "passes"),
        ("a, b = map(int, input().split())\nprint(b // (a - 1) * 0 + a + b)", 0.0, 2 / 3, "crash", "ZeroDivision"),
        ("print(", 0.0, 0.0, "crash", "SyntaxError"),
        ("", 0.0, 0.0, "wrong", "got ''"),
        ("import nothing_of_that_name", 0.0, 0.0, "crash", "ModuleNotFoundError"),
        ("x = bytearray(10**10)", 0.0, 0.0, "memory", "MemoryError"),
        ("print('x' * 10**6)", 0.0, 0.0, "output flood", "output_kb"),
        ("import os\nos.kill(os.getpid(), 11)", 0.0, 0.0, "crash", "SIGSEGV"),
        ("if __name__ == '__main__':\n    print(sum(map(int, input().split())))", 1.0, 1.0, "right", "passes"),
        ("n = int(gcd(4, 2))\nprint(reduce(add, map(int, input().split())))", 1.0, 1.0, "right", "passes"),
        (
            "class A:\n    pass\nimport pickle\npickle.dumps(A())\nprint(sum(map(int, input().split())))",
            1.0,
            1.0,
            "right",
            "",
        ),
    ],
)
def test_programs_with_input(source, reward, share, kind, words):
    """Each verdict, with its reason; the prelude is LiveCodeBench's."""
    assert_verdict(SUM, source, reward, share, kind, words)


@pytest.mark.parametrize(
    "source, kind",
    [
        ("print(10)\nquit()", "right"),
        ("print(10)\nexit(1)", "right"),  # LiveCodeBench takes every SystemExit for an end
        ("import sys\nprint(10)\nsys.exit('done')", "right"),
        ("quit()\nprint(10)", "wrong"),
        ("print(10)\nraise ValueError", "crash"),
        ("import os\nprint(10, flush=True)\nos._exit(1)", "crash"),
        ("print(len(str(10**5000)) - 4991)", "right"),
        ("print(len(str(10**50000)) - 49991)", "crash"),  # one more digit than LiveCodeBench allows
        ("print(sum(map(int, open('/dev/stdin').read().split())))", "right"),
        ("import io, os\nprint(sum(map(int, io.BytesIO(os.read(0, os.fstat(0).st_size)).read().split())))", "right"),
        ("input()\nimport sys\nsys.stdin.seek(0)\nprint(sum(map(int, sys.stdin.read().split())))", "right"),
        ("import os\nos.truncate(0, 1 << 20)", "crash"),
        ("open('/dev/stdin', 'w')", "crash"),
    ],
)
def test_programs_of_contests(source, kind):
    """What such programs expect of an interpreter with its input in a file."""
    reward, why, found = scored({"type": "stdin", "inputs": ["3 7\n"], "outputs": ["10\n"]}, fenced(source))
    assert (found, reward) == (kind, float(kind == "right")), why


@pytest.mark.parametrize("end", ["exit()", "quit(1)", "raise SystemExit"])
def test_a_program_for_calls_may_end(end):
    """Its functions are there; not so where it ends before them, or inside of one."""
    source = f"def half(n):\n    return n // 2\n\n{end}"
    assert scored(CHECK, fenced(source))[::2] == (1.0, "right")
    assert scored(TWICE, fenced(source.replace("half", "twice").replace("n // 2", "n * 2")))[::2] == (1.0, "right")
    assert scored(CHECK, fenced(f"{end}\n{source}"))[0] == 0.0
    assert scored(CHECK, fenced(f"def half(n):\n    {end}"))[::2] == (0.0, "crash")


@pytest.mark.slow
def test_a_time_out_with_input():
    """Only the second input hangs, and is named."""
    source = "a, b = map(int, input().split())\nwhile a == 30:\n    pass\nprint(a + b)"
    reward, why, kind = scored(SUM, fenced(source))
    assert (reward, kind) == (0.0, "time-out") and why.startswith("test 2 of 3: ")


def test_no_test_begins_after_the_time_of_a_call():
    """With reward.code.score=fraction all tests run: those that find no time left count as failed."""
    hurried = SHARE.model_copy(update={"timeout_s": 0.2})
    reward, why, kind = scored(
        SUM, fenced("import time\ntime.sleep(0.3)\nprint(sum(map(int, input().split())))"), hurried
    )
    assert (reward, kind) == (pytest.approx(1 / 3), "time-out") and "reward.timeout_s" in why


def test_a_program_does_not_share_its_random_numbers():
    """All are forks of one process: without a new seed they would draw the same."""
    tests = {"type": "stdin", "inputs": [""] * 2, "outputs": ["0", "0"]}
    drawn = [scored(tests, fenced("import random\nprint(random.random())"))[1] for _ in range(2)]
    assert drawn[0] != drawn[1]


# Functions that are called


@pytest.mark.slow
@pytest.mark.parametrize(
    "source, reward, share, kind, words",
    [
        ("def twice(x):\n    return x * 2", 1.0, 1.0, "right", "passes 3"),
        ("def twice(x):\n    return tuple(x) * 2 if isinstance(x, list) else x * 2", 1.0, 1.0, "right", "passes"),
        ("def twice(x):\n    return 2", 0.0, 1 / 3, "wrong", "test 2 of 3: expected [1, 2, 1, 2], got 2"),
        (
            "class Solution:\n    def twice(self, x: List[int]) -> List[int]:\n        return x + x",
            1.0,
            1.0,
            "right",
            "",
        ),
        ("def twice(x):\n    return x + x if x != 'ab' else 1 // 0", 0.0, 2 / 3, "crash", "ZeroDivisionError"),
        (
            "def twice(x):\n    while x == [1, 2]:\n        pass\n    return x + x",
            0.0,
            1 / 3,
            "time-out",
            "test 2 of 3",
        ),
        ("def double(x):\n    return x + x", 0.0, 0.0, "wrong", "has no twice"),
        ("import os\ndef twice(x):\n    os._exit(0)", 0.0, 0.0, "crash", "ended before it answered"),
        ("twice = lambda x: print('noise') or x + x", 1.0, 1.0, "right", "passes"),
        ("def twice(x):\n    x += x\n    return x", 1.0, 1.0, "right", "passes"),
        ("def twice(x):\n    return (y for y in x)", 0.0, 0.0, "crash", "not iterable"),
        ("def twice(x):\n    return print", 0.0, 0.0, "wrong", "got <builtin_function_or_method>"),
        ("raise ValueError('at once')", 0.0, 0.0, "crash", "ValueError: at once"),
    ],
)
def test_functions_that_are_called(source, reward, share, kind, words):
    assert_verdict(TWICE, source, reward, share, kind, words)


def test_a_method_of_a_class():
    """LeetCode's form, by its dotted name, with annotations that it does not import."""
    tests = {"type": "call", "name": "Solution.most", "inputs": [[[3, 9, 2]], [[1]]], "outputs": [9, 1]}
    source = "class Solution:\n    def most(self, numbers: List[int]) -> Optional[int]:\n        return max(numbers)"
    assert scored(tests, fenced(source))[0] == 1.0
    assert scored(tests, fenced("def most(numbers):\n    return max(numbers)"))[0] == 1.0  # as LiveCodeBench
    assert scored(tests, fenced("class Solution:\n    pass\n\ndef most(numbers):\n    return max(numbers)"))[0] == 0.0
    named_as_imported = tests | {"name": "Solution.add", "inputs": [[1, 2]], "outputs": [3]}
    assert scored(named_as_imported, fenced("pass"))[0] == 0.0


@pytest.mark.parametrize(
    "value, expected, equal",
    [
        (1, 1, True),
        (1, 1.0, True),
        (True, 1, True),
        (0.1 + 0.2, 0.3, False),  # LiveCodeBench has no tolerance here either
        ((1, (2, 3)), [1, [2, 3]], True),
        ([1, 2], [1, 2, 3], False),
        ({"a": (1,)}, {"a": [1]}, True),
        ({"a": 1}, {"a": 1, "b": 2}, False),
        ({"a": 1, "b": 2}, {"a": 1, "b": 3}, False),
        ({1: 2}, {"1": 2}, False),
        ({(1,): 2}, {"a": 2}, False),
        ({"a": 1, (1,): 2}, {"a": 1, "b": 2}, False),
        ([1, 2], [1, 3], False),
        ([1], 1, False),
        ({1, 2}, [1, 2], False),
        (2**100, 2**100, True),
        (2**100, 2**100 + 1, False),
        (float("inf"), float("inf"), True),
        (float("nan"), float("nan"), False),
        (None, None, True),
        (None, 0, False),
        ("1", 1, False),
        ([], {}, False),
        ({}, [], False),
        ("ä\ud800", "ä\ud800", True),
        (b"a", "a", False),
    ],
)
def test_values_are_compared_as_python_does(value, expected, equal):
    """Against Python's own ==, but that a tuple is a list. What travels is tagged JSON."""
    assert (with_lists(value) == expected) is equal
    assert same(expected, json.loads(codec.encode(value))) is equal


def test_other_values_than_numbers_are_not_decoded():
    """Nothing of a program's is hashed, and 1+0j is not 1."""
    assert not any(same(expected, json.loads(codec.encode(1 + 0j))) for expected in (1, 1.0, [1]))


def with_lists(value):
    if isinstance(value, dict):
        return {key: with_lists(item) for key, item in value.items()}
    return [with_lists(item) for item in value] if isinstance(value, list | tuple) else value


@pytest.mark.parametrize(
    "value",
    [0, -5, 2**63, -(2**200), 1.5, float("inf"), 1e-300, "", "\0\ud800", None, True, b"\0", 1j, (), [], {}, set()]
    + [{1: {2: (3, [4])}}, {(1, frozenset({2})): {3}}, {frozenset({(1, 2)})}, [[[]]], complex(0, float("inf"))],
)
def test_values_travel(value):
    """There and back, with their types."""
    back = codec.decode(codec.encode(value))
    assert back == value and type(back) is type(value)


@pytest.mark.parametrize(
    "expected, got, equal",
    [
        ("5", "5\n", True),
        ("5\n6", "5  \n6\n\n", True),
        ("5\n6", "5 6", False),
        ("5\n6", "5", False),
        ("5", "5\n6", False),
        ("5\n6", "5\n7", False),
        ("a\n yes", "a\nyes ", True),
        ("a\nyes ", "a\n yes", True),
        ("1.0", "1.000", True),
        ("1.0 2", "1 2.00", True),
        ("1.0 2", "1 2.00 3", False),
        ("0.3333", "0.33333", False),
        ("50000000000000000", "50000000000000001", False),
        ("1e3", "1000", True),
        ("yes", "YES", False),
        ("", "", True),
        ("", "0", False),
        ("a\n\nb", "a\nb", False),
        ("sNaN", "1", False),
        ("1e999999999", "2", False),
    ],
)
def test_outputs_are_compared_as_livecodebench_does(expected, got, equal):
    assert same_output(expected, got) is equal


# Rows


@pytest.mark.parametrize(
    "tests, words",
    [
        (None, "NoneType"),
        ({"type": "exam"}, "'exam'"),
        ({"type": "stdin", "inputs": ["1"], "outputs": []}, "1 inputs and 0 outputs"),
        ({"type": "stdin", "inputs": [], "outputs": []}, "one at least"),
        (SUM | {"inputs": ["1", 2, "3"]}, "each of 'inputs' must be a str"),
        (SUM | {"outputs": ["1", 2, "3"]}, "each of 'outputs' must be a str"),
        ({"type": "call", "name": "f", "inputs": [1], "outputs": [1]}, "must be a list"),
        *((SUM | {name: "1"}, f"{name!r} must be a list, is '1'") for name in ("inputs", "outputs")),
        *((TWICE | {name: None}, f"{name!r} must be a list, is None") for name in ("inputs", "outputs")),
        (TWICE | {"name": None}, "'name' must be a str, is None"),
        *((CHECK | {name: None}, f"{name!r} must be a str, is None") for name in ("name", "code", "stub")),
        (CHECK | {"code": "def check(candidate:\n"}, "SyntaxError"),
        (CHECK | {"code": "pass"}, "KeyError"),
    ],
)
def test_rows_without_tests_are_a_failed_call(tests, words):
    """A row without any test would else give every program its reward."""
    with pytest.raises(ValueError, match=".*") as caught:
        scored(tests, "```python\nprint(1)\n\ndef half(n):\n    return 3\n```")
    assert "row['tests']" in str(caught.value) and words in str(caught.value)
