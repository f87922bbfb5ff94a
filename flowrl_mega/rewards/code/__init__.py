"""Rewards for programs: the last code block of a response, run against a row's tests in a sandbox.

`row["tests"]` is one of (see docs/sandbox.md)
    {"type": "stdin", "inputs": [text], "outputs": [text]}
    {"type": "call", "name": "f" or "Solution.f", "inputs": [[argument]], "outputs": [value]}
    {"type": "check", "name": function, "code": "def check(candidate): ...", "stub": the prompt's code}
"""

from __future__ import annotations

import os
import re
import time
from collections.abc import Set
from typing import Any

from flowrl_mega.config import CodeSettings, RewardSettings
from flowrl_mega.rewards.code import remote
from flowrl_mega.rewards.code.answer import program
from flowrl_mega.rewards.code.judge import Verdict, call_tests, check_tests, problem_of, stdin_tests
from flowrl_mega.rewards.code.modules import check_modules
from flowrl_mega.rewards.sandbox.choose import choose
from flowrl_mega.rewards.sandbox.client import Sandbox

SHARE_OF_TIME = 0.8  # of reward.timeout_s, after which no further test of a program begins

_sandboxes: dict[tuple[int, str], Sandbox] = {}


DEFAULT = RewardSettings(function="flowrl_mega.rewards.code:score")


def describe(settings: RewardSettings, kinds: Set[str] = frozenset(), modules: Set[str] = frozenset()) -> str:
    """Which isolation programs get here, in words.

    Raises ConfigError if it is less than reward.code.isolation, if reward.code.url does not answer, or if `modules`,
    which the tests of rows import, cannot be imported there.
    """
    if settings.code.url:
        runner = remote.Remote(settings.code)
        words = runner.describe()
        check_modules(runner, modules, settings.code)
        return words
    sandbox, words = choose(settings.code)
    try:
        check_modules(sandbox, modules, settings.code)
    finally:
        sandbox.close()
    return f"sandbox: {words}"


def score(row: dict[str, Any], response: str, settings: RewardSettings = DEFAULT) -> tuple[float, str, str]:
    """(reward in [0, 1], why, kind): 1 if the program in `response` passes all of `row["tests"]`.

    Else 0, or the share of tests that it passes where reward.code.score says so. The kind is right, wrong, no code,
    time-out, crash, memory, processes or output flood. ValueError: the row's tests are no tests.
    """
    tests = row.get("tests")
    problem = problem_of(tests)
    if problem:
        raise ValueError(f"row['tests']: {problem}")
    assert tests is not None, "problem_of has seen it"
    code = program(response, tests)
    if code is None:
        return 0.0, "no ```python block", "no code"
    verdict = _verdict(code, tests, settings)
    reward = verdict.passed / verdict.total
    return reward if settings.code.score == "fraction" else float(reward == 1), verdict.why, verdict.kind


score.right_at = 1.0  # type: ignore[attr-defined]  # a program that passes some tests is wrong


def _verdict(code: str, tests: dict[str, Any], settings: RewardSettings) -> Verdict:
    deadline = time.monotonic() + SHARE_OF_TIME * settings.timeout_s
    all_of_them = settings.code.score == "fraction"
    if settings.code.url:
        runner = remote.Remote(settings.code)
        if tests["type"] == "stdin":
            return stdin_tests(runner, code, tests, all_of_them, deadline)
        if tests["type"] == "call":
            return remote.call_tests(runner, code, tests, all_of_them)
        return remote.check_tests(runner, completed(code, tests), tests, deadline)
    sandbox = _sandbox(settings.code)
    if tests["type"] == "stdin":
        return stdin_tests(sandbox, code, tests, all_of_them, deadline)
    if tests["type"] == "call":
        return call_tests(sandbox, code, tests, all_of_them)
    return check_tests(sandbox, completed(code, tests), tests)


def completed(code: str, tests: dict[str, Any]) -> list[str]:
    """The sources to execute one after the other: the stub (its imports and helpers), then a program that defines the
    function itself; or the stub and its completion as one."""
    defines = re.search(rf"^(async )?def {re.escape(tests['name'])}\b", code, re.MULTILINE)
    if defines:
        return [tests["stub"], code]
    ends_line = tests["stub"].endswith((":", '"""', "'''"))
    return [tests["stub"] + ("\n" if ends_line else "") + code]


def _sandbox(settings: CodeSettings) -> Sandbox:
    """This process's sandbox, started at its first program and again if it has died."""
    key = os.getpid(), settings.model_dump_json()
    sandbox = _sandboxes.get(key)
    if sandbox is None or not sandbox.alive():
        sandbox = _sandboxes[key] = choose(settings)[0]
    return sandbox
