"""Recipes of programming problems: what their tests look like as published, and as our code reward reads them.

Tests are one of
    {"type": "stdin", "inputs": [text], "outputs": [text]}
    {"type": "call", "name": "f" or "Solution.f", "inputs": [[arguments]], "outputs": [value]}
    {"type": "check", "name": "f", "code": "def check(candidate): ...", "stub": the code that is to be completed}
"""

from __future__ import annotations

import ast
import base64
import json
import pickletools
import zlib
from itertools import islice
from typing import Any

from flowrl_mega.data.prepare.problem import BAD_TESTS, BadRow, Problem, code, column, text_of

STDIN = (
    "{}\n\nWrite a Python program that reads from standard input and writes to standard output. "
    "Put the whole program in one ```python block."
)
CALL = "{}\n\nWrite Python code{}. Put all of it in one ```python block."
STARTER = " that starts like this:\n```python\n{}\n```\n"
COMPLETE = "Complete this Python function. Put the whole function, with its imports, in one ```python block.\n\n{}"
MOST_BYTES = 1 << 29  # of unpacked tests: more is taken for a bomb
# All that a pickle of one text is made of; its other operations build objects and call functions.
TEXT_ONLY = set(
    "PROTO FRAME UNICODE BINUNICODE SHORT_BINUNICODE BINUNICODE8 MEMOIZE PUT BINPUT LONG_BINPUT STOP".split()
)


def deepcoder(record: dict[str, Any], wording: str) -> Problem:
    """problem; tests: JSON, of one of the forms below; starter_code; metadata: {"func_name"}.

    taco: {"inputs", "outputs", "fn_name" or not}. primeintellect: [{"type": "stdin_stdout" or "function_call",
    "fn_name", "input", "output"}]. lcbv5: [{"testtype": "stdin" or "functional", "input", "output"}], the function's
    name in metadata. codeforces: [{"input", "output"}] or taco's form. (Read in rLLM's and NeMo-RL's loaders.)
    """
    problem = text_of(record, "problem")
    tests = _json(column(record, "tests"), "tests")
    starter = record.get("starter_code") or ""
    if isinstance(tests, dict):
        cases = _zip(tests)
        name = tests.get("fn_name")
    else:
        cases = _cases(tests)
        name = cases[0].get("fn_name") or _function_name(record, cases)
    return _with_cases(problem, starter, cases, name)


def livecodebench(record: dict[str, Any], wording: str) -> Problem:
    """question_content; starter_code; public_test_cases: JSON; private_test_cases: JSON, or in code_generation_lite
    base64 of zlib of a pickled JSON text; metadata: JSON with func_name. (Read in LiveCodeBench's code_generation.py.)
    """
    problem = text_of(record, "question_content", "problem")
    private = column(record, "private_test_cases")
    if isinstance(private, str) and not private.lstrip().startswith("["):
        private = unpack(private)
    cases = _cases(_json(column(record, "public_test_cases"), "public_test_cases"), may_be_empty=True)
    cases += _cases(_json(private, "private_test_cases"), may_be_empty=bool(cases))
    return _with_cases(problem, record.get("starter_code") or "", cases, _function_name(record, cases))


def humaneval(record: dict[str, Any], wording: str) -> Problem:
    """prompt; test: "def check(candidate)"; entry_point. (Columns read in lm-eval's humaneval.yaml, of which
    humaneval_plus.yaml is another data set with the same ones.)
    """
    stub = column(record, "prompt", "problem")
    tests = {
        "type": "check",
        "name": text_of(record, "entry_point"),
        "code": text_of(record, "test", "tests"),
        "stub": stub,
    }
    text = text_of(record, "prompt", "problem")
    check_tests(tests)
    return code(text, COMPLETE.format(f"```python\n{stub.rstrip()}\n```"), tests)


def check_tests(tests: Any) -> None:
    """Raise BadRow unless these are tests as the code reward reads them."""
    if not isinstance(tests, dict):
        raise BadRow(BAD_TESTS, f"'tests' is a {type(tests).__name__}; must be an object")
    kind = tests.get("type")
    if kind == "check":
        _check_function(tests)
    elif kind in ("stdin", "call"):
        inputs, outputs = tests.get("inputs"), tests.get("outputs")
        if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0):
            raise BadRow(BAD_TESTS, "'inputs' and 'outputs' must be lists of one length, with at least one test")
        if kind == "stdin" and not all(isinstance(value, str) for value in (*inputs, *outputs)):
            raise BadRow(BAD_TESTS, "inputs and outputs of programs must be text")
        if kind == "call" and not all(isinstance(arguments, list) for arguments in inputs):
            raise BadRow(BAD_TESTS, "inputs of calls must be lists of arguments")
        if kind == "call" and not _is_name(tests.get("name")):
            raise BadRow(BAD_TESTS, f"'name' must be that of a function or of a method, not {tests.get('name')!r:.100}")
    else:
        raise BadRow(BAD_TESTS, "'tests' must be an object whose 'type' is stdin, call or check")


def _check_function(tests: dict[str, Any]) -> None:
    if not _is_name(tests.get("name")) or not isinstance(tests.get("stub"), str):
        raise BadRow(BAD_TESTS, "tests of type check need the function's 'name' and the 'stub' that is to be completed")
    try:
        tree = ast.parse(tests["code"])
    except (SyntaxError, ValueError, TypeError, KeyError, MemoryError, RecursionError) as error:
        raise BadRow(BAD_TESTS, f"the tests are no Python code ({type(error).__name__}: {error!s:.100})") from None
    if not any(isinstance(part, ast.FunctionDef) and part.name == "check" for part in tree.body):
        raise BadRow(BAD_TESTS, "the tests do not define check(candidate)")


def _is_name(name: Any) -> bool:
    return isinstance(name, str) and 1 <= len(parts := name.split(".")) <= 2 and all(map(str.isidentifier, parts))


def _with_cases(problem: str, starter: Any, cases: list[dict[str, Any]], name: Any) -> Problem:
    """A problem whose tests are {"input", "output"} each: of a whole program if `name` is empty, else of a function."""
    if not isinstance(starter, str):
        raise BadRow(BAD_TESTS, "'starter_code' must be text")
    if not name:
        return _program(problem, cases)
    if isinstance(name, str) and "class Solution" in starter and "." not in name:
        name = f"Solution.{name}"
    return _function(problem, starter, cases, name)


def _program(problem: str, cases: list[dict[str, Any]]) -> Problem:
    """A problem whose tests run a program: text on standard input, text expected on standard output."""
    tests = {
        "type": "stdin",
        "inputs": [_lines(case.get("input")) for case in cases],
        "outputs": [_lines(case.get("output")) for case in cases],
    }
    check_tests(tests)
    return code(problem, STDIN.format(problem), tests)


def _function(problem: str, starter: str, cases: list[dict[str, Any]], name: Any) -> Problem:
    """A problem whose tests call the function or method `name`."""
    inputs, outputs = [case.get("input") for case in cases], [case.get("output") for case in cases]
    if _is_functional(cases):
        inputs, outputs = [_arguments(value) for value in inputs], [_json(value, "output") for value in outputs]
    else:
        outputs = _unwrapped(outputs)
    tests = {"type": "call", "name": name, "inputs": inputs, "outputs": outputs}
    check_tests(tests)
    how = STARTER.format(starter.rstrip()) if starter.strip() else f" that defines {name}"
    return code(problem, CALL.format(problem, how), tests)


def _is_functional(cases: list[dict[str, Any]]) -> bool:
    """Whether these are LiveCodeBench's calls of a function, whose inputs and outputs are JSON."""
    return any(case.get("testtype") == "functional" for case in cases)


def _arguments(value: Any) -> list[Any]:
    """The arguments in a functional test's input: one per line, as JSON."""
    return [_json(line, "input") for line in _lines(value).split("\n") if line.strip()]


def _unwrapped(outputs: list[Any]) -> list[Any]:
    """Results without the list of one that TACO, like APPS before it, puts around them in most problems.

    Not in all problems, and no column tells in which: they are unwrapped if all results of a problem are lists of one.
    """
    lists = [value for value in outputs if isinstance(value, list) and len(value) == 1]
    return [value[0] for value in lists] if len(lists) == len(outputs) else outputs


def _lines(value: Any) -> Any:
    """A program's input or output as text; TACO gives some as lists of lines."""
    if isinstance(value, list) and all(isinstance(line, str) for line in value):
        return "\n".join(value)
    if not isinstance(value, str):
        raise BadRow(BAD_TESTS, f"a test's input or output is a {type(value).__name__}; must be text")
    return value


def _zip(tests: dict[str, Any]) -> list[dict[str, Any]]:
    inputs, outputs = tests.get("inputs"), tests.get("outputs")
    if not (isinstance(inputs, list) and isinstance(outputs, list) and len(inputs) == len(outputs) > 0):
        raise BadRow(BAD_TESTS, "'tests' must hold 'inputs' and 'outputs' of one length, with at least one test")
    return [{"input": i, "output": o} for i, o in zip(inputs, outputs, strict=True)]


def _cases(tests: Any, may_be_empty: bool = False) -> list[dict[str, Any]]:
    if not isinstance(tests, list) or not all(isinstance(case, dict) for case in tests):
        raise BadRow(BAD_TESTS, "tests must be a list of objects with 'input' and 'output'")
    if not tests and not may_be_empty:
        raise BadRow(BAD_TESTS, "there are no tests")
    return list(tests)


def _function_name(record: dict[str, Any], cases: list[dict[str, Any]]) -> Any:
    """The function that the tests call, from the column metadata; None for tests of programs."""
    if not _is_functional(cases):
        return None
    found = record.get("metadata") or cases[0].get("metadata")
    metadata = _json(found, "metadata") if isinstance(found, str) else found
    name = metadata.get("func_name") if isinstance(metadata, dict) else None
    if not name:
        raise BadRow(BAD_TESTS, "the tests call a function, and 'metadata' has no 'func_name'")
    return name


def _json(value: Any, name: str) -> Any:
    """The value of a column that holds JSON text; anything but text is returned as it is."""
    if not isinstance(value, str):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise BadRow(BAD_TESTS, f"{name!r} is not JSON ({error!s:.100})") from None


def unpack(packed: str) -> str:
    """The one text in base64 of zlib of a pickle, whose operations are read and never run. BadRow if it is not that."""
    try:
        unzip = zlib.decompressobj()
        data = unzip.decompress(base64.b64decode(packed, validate=True), MOST_BYTES)
        if unzip.unconsumed_tail or not unzip.eof:
            raise ValueError("it is cut off, or too large")
        read = islice(pickletools.genops(data), len(TEXT_ONLY))  # one text takes five at most
        operations = [(operation.name, value) for operation, value, _ in read]
    except (ValueError, zlib.error) as error:
        raise BadRow(BAD_TESTS, f"the packed tests cannot be unpacked ({error!s:.100})") from None
    texts = [value for _, value in operations if isinstance(value, str)]
    if not TEXT_ONLY.issuperset(name for name, _ in operations) or len(texts) != 1:
        raise BadRow(BAD_TESTS, "the packed tests hold something else than one text; must be JSON text")
    return texts[0]
