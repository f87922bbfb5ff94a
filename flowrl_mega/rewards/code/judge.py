"""The three forms of tests for a program, each judged in this process: what is expected never enters a program's own.

Comparison is LiveCodeBench's, which DeepCoder's rewards take over: outputs line by line without the white space around
each, else the numbers in a line as exact decimals; values by ==, a tuple as a list. There is no tolerance.
"""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any, Protocol

from flowrl_mega.rewards.sandbox import codec
from flowrl_mega.rewards.sandbox.client import Outcome, Program, Sandbox, advance

SHOWN = 60  # characters of a value in a reason


@dataclass(frozen=True)
class Verdict:
    """`passed` of `total` tests; why not more, and the kind of the first failure ("right" if there was none)."""

    passed: int
    total: int
    why: str
    kind: str


Failure = tuple[str, str]  # kind, why
FORGED = ("wrong", "wrote on the channel itself")
SILENT = ("crash", "ended before it answered")


class Runner(Protocol):
    """What runs a whole program: a sandbox of this machine or a remote one."""

    def run(self, code: str, stdin: str, prelude: bool = False) -> Outcome: ...


def stdin_tests(runner: Runner, code: str, tests: dict[str, Any], all_of_them: bool, deadline: float) -> Verdict:
    """{"inputs": [text], "outputs": [text]}: a process for each test, until the first failure unless `all_of_them`."""

    def one(index: int) -> Failure | None:
        if time.monotonic() > deadline:
            return "time-out", "no time left for it (reward.timeout_s)"
        outcome = runner.run(code, tests["inputs"][index], prelude=True)
        expected = tests["outputs"][index]
        return trouble(outcome) or (None if same_output(expected, outcome.stdout) else wrong(expected, outcome.stdout))

    return count(one, len(tests["inputs"]), all_of_them)


def call_tests(sandbox: Sandbox, code: str, tests: dict[str, Any], all_of_them: bool) -> Verdict:
    """{"name", "inputs": [[argument]], "outputs": [value]}: one process answers all calls."""
    with sandbox.start(mode="call", parts=[code], name=tests["name"], prelude=True) as program:
        failure = ready(program, tests["name"])

        def one(index: int) -> Failure | None:
            if failure:
                return failure
            answer = ask(program, codec.encode([tests["inputs"][index], {}]))
            return ended(program) if answer is None else judge_answer(answer, tests["outputs"][index])

        return count(one, len(tests["inputs"]), all_of_them)


def check_tests(sandbox: Sandbox, parts: list[str], tests: dict[str, Any]) -> Verdict:
    """{"name", "code": defines check(candidate), "stub"}: the tests run in a process of their own, the judge's.

    Its `candidate` asks the program's process, and each call and each answer passes through here. The judge's word is
    the verdict: no line of the program runs in it. All of `code` is one test.
    """
    name = tests["name"]
    with (
        sandbox.start(mode="call", parts=parts, name=name, prelude=False) as program,
        sandbox.start(mode="judge", stub=tests["stub"], code=tests["code"], name=name) as judge,
    ):
        failure = ready(program, name)
        if failure:
            return checked(failure)
        word = ask(judge)
        while word and word[:1] == b"C":
            answer = ask(program, word[1:])
            if answer is None or answer[:1] not in (b"V", b"E"):
                return checked(ended(program) if answer is None else FORGED)
            word = ask(judge, answer)
        return checked(failed_check(word) if word else ended(judge))


def checked(failure: Failure | None) -> Verdict:
    """A check's tests are one: it passes or not."""
    kind, why = failure or ("right", "passes check")
    return Verdict(0 if failure else 1, 1, why, kind)


def failed_check(word: bytes) -> Failure | None:
    """What a judge's last word means. ValueError: its tests do not work."""
    if word[:1] == b"P":
        return None
    if word[:1] == b"B":
        raise ValueError(f"row['tests']['code'] does not work: {word[1:].decode()}")
    kind, text, line = json.loads(word[1:])
    if kind == "AssertionError":
        return "wrong", f"fails {_short(line, quoted=False)}" + (f" ({_short(text, quoted=False)})" if text else "")
    return _crash_kind(kind), f"{kind}: {_short(text, quoted=False)}"


def ready(program: Program, name: str) -> Failure | None:
    """Waits until a program for calls has been executed; why it cannot be called."""
    word = ask(program)
    return ended(program) if word is None else ready_word(word, name)


def ready_word(word: bytes, name: str) -> Failure | None:
    """What the first word of a program for calls means."""
    try:
        if word[:1] != b"M":
            return None if word == b"R" else FORGED
        kind, text = (str(part) for part in json.loads(word[1:]))
    except (ValueError, TypeError, RecursionError):
        return FORGED
    missing = kind == "AttributeError" and name.rpartition(".")[2] in text
    return ("wrong", f"has no {name}") if missing else (_crash_kind(kind), f"{kind}: {_short(text, quoted=False)}")


def ask(program: Program, frame: bytes | None = None) -> bytes | None:
    """Sends a frame, if there is one to send, and waits for one. None: the program has ended."""
    if frame is not None:
        program.send(frame)
    advance([program], lambda: bool(program.frames))
    return program.frames.popleft() if program.frames else None


def ended(program: Program) -> Failure:
    """Why a program that should have answered did not."""
    advance([program], lambda: False)
    return trouble(program.outcome()) or SILENT


def judge_answer(answer: bytes, expected: Any) -> Failure | None:
    """Compares one answer of a called program with what was expected."""
    try:
        value = json.loads(answer[1:])
        if answer[:1] == b"E":
            kind, text = (str(part) for part in value)
            return _crash_kind(kind), f"{kind}: {_short(text)}"
        if answer[:1] == b"V" and same(expected, value):
            return None
        return "wrong", f"expected {_short(expected)}, got {_short(codec.decode(answer[1:]))}"
    except Exception:  # nothing that codec.encode has written
        return "wrong", f"expected {_short(expected)}, got what is no value"


def same(expected: Any, got: Any) -> bool:
    """Whether a JSON value equals a tagged one (see codec.py). Nothing of a program's is hashed here: it could choose
    numbers that all fall on one place of a set."""
    if isinstance(got, dict):
        tag, inner = got["t"], got["v"]
        if tag == "tuple":
            return same(expected, inner)
        if tag == "dict":
            names = [key for key, _ in inner]
            if not isinstance(expected, dict) or not all(isinstance(name, str) for name in names):
                return False
            values = dict(zip(names, (value for _, value in inner), strict=True))
            return values.keys() == expected.keys() and all(same(expected[key], values[key]) for key in expected)
        return tag in ("int", "float") and expected == codec.decode(json.dumps(got).encode())
    if isinstance(got, list):
        long_enough = isinstance(expected, list) and len(expected) == len(got)
        return long_enough and all(same(*pair) for pair in zip(expected, got, strict=True))
    return bool(expected == got)


def same_output(expected: str, got: str) -> bool:
    """Whether an output is the expected one."""
    lines, got_lines = (text.strip().split("\n") for text in (expected, got))
    return len(lines) == len(got_lines) and all(_same_line(*pair) for pair in zip(lines, got_lines, strict=True))


def _same_line(expected: str, got: str) -> bool:
    if expected.strip() == got.strip():
        return True
    try:
        pairs = [[Decimal(word) for word in line.split()] for line in (expected, got)]
        return pairs[0] == pairs[1]
    except InvalidOperation:  # a word that is no number
        return False


def trouble(outcome: Outcome) -> Failure | None:
    """Why a program did not end well."""
    if outcome.end == "exit":
        if not outcome.code:
            return None
        last = (outcome.stderr.strip().splitlines() or [f"exit status {outcome.code}"])[-1]
        return _crash_kind(last), _short(last, quoted=False)
    return {
        "wall": ("time-out", "took too long (reward.code.wall_s)"),
        "cpu": ("time-out", "used too much CPU time (reward.code.cpu_s)"),
        "memory": ("memory", "used too much memory (reward.code.memory_mb)"),
        "processes": ("processes", "started too many processes (reward.code.processes)"),
        "supervisor": ("crash", "its supervisor was killed, as a program can without a user of its own"),
        "flood": ("output flood", "wrote too much (reward.code.output_kb)"),
    }.get(outcome.end) or ("crash", f"killed by {_signal(outcome.code)}")


def wrong(expected: object, got: object) -> Failure:
    if isinstance(expected, str) and isinstance(got, str):
        expected, got = expected.strip(), got.strip()
    return "wrong", f"expected {_short(expected)}, got {_short(got)}"


def count(one: Callable[[int], Failure | None], total: int, all_of_them: bool) -> Verdict:
    """The verdict over tests 0..total-1."""
    passed, first = 0, ("right", f"passes {total} tests")
    for index in range(total):
        failure = one(index)
        if failure is None:
            passed += 1
            continue
        if first[0] == "right":
            first = failure[0], f"test {index + 1} of {total}: {failure[1]}"
        if not all_of_them:
            break
    return Verdict(passed, total, first[1], first[0])


def _crash_kind(last_line: str) -> str:
    return "memory" if last_line.startswith("MemoryError") else "crash"


def _signal(number: int) -> str:
    return signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"


def _short(value: object, quoted: bool = True) -> str:
    """A value in a reason: printable, of one line."""
    try:
        text = repr(value) if quoted else str(value)
    except (ValueError, RecursionError):  # a number of more digits than Python prints
        text = f"a {type(value).__name__}"
    text = "".join(mark if mark.isprintable() else "?" for mark in text[: SHOWN + 1])
    return text if len(text) <= SHOWN else text[:SHOWN] + "..."


def problem_of(tests: Any) -> str | None:
    """What is wrong with a row's tests, if anything."""
    forms: dict[str, dict[str, type | Sequence[type]]] = {
        "stdin": {"inputs": list, "outputs": list},
        "call": {"name": str, "inputs": list, "outputs": list},
        "check": {"name": str, "code": str, "stub": str},
    }
    if not isinstance(tests, dict) or tests.get("type") not in forms:
        kind = tests.get("type") if isinstance(tests, dict) else type(tests).__name__
        return f"type is {kind!r}, not one of {', '.join(forms)}"
    for name, kind in forms[tests["type"]].items():
        if not isinstance(tests.get(name), kind):  # type: ignore[arg-type]
            return f"{name!r} must be a {kind.__name__}, is {tests.get(name)!r:.60}"  # type: ignore[union-attr]
    if tests["type"] == "check":
        return None
    if not tests["inputs"] or len(tests["inputs"]) != len(tests["outputs"]):
        return f"{len(tests['inputs'])} inputs and {len(tests['outputs'])} outputs: as many of both, one at least"
    inside = str if tests["type"] == "stdin" else list
    if not all(isinstance(item, inside) for item in tests["inputs"]):
        return f"each of 'inputs' must be a {inside.__name__}"
    if inside is str and not all(isinstance(item, str) for item in tests["outputs"]):
        return "each of 'outputs' must be a str"
    return None
