"""The same tests in a remote sandbox: SandboxFusion's POST /run_code (reward.code.url).

A request is one whole program with its input, so there is no channel to ask questions through. Calls go as a list in
one program. A `check` test is replayed: the judge runs with the answers so far until it asks for the next, the program
then answers all of them again. So here too what is expected, and the verdict, never stand in a program's process.
"""

from __future__ import annotations

import base64
import json
import secrets
import time
import urllib.error
import urllib.request
from functools import cache
from pathlib import Path
from typing import Any

from flowrl_mega.config import CodeSettings, ConfigError
from flowrl_mega.rewards.code.judge import (
    FORGED,
    SILENT,
    Failure,
    Verdict,
    checked,
    count,
    failed_check,
    judge_answer,
    ready_word,
    trouble,
)
from flowrl_mega.rewards.sandbox import codec
from flowrl_mega.rewards.sandbox.client import Outcome, SandboxError
from flowrl_mega.rewards.sandbox.prelude import TEXT as PRELUDE

ATTEMPTS = 3
DELAY_S = 0.5  # before the second attempt; twice that before the third
GRACE_S = 10.0  # for the answer, beyond the program's time
MODULES = ("codec", "prelude", "inside")
SCRIPT = """import sys, types
for name, source in {modules!r}.items():
    module = sys.modules[name] = types.ModuleType(name)
    exec(source, module.__dict__)
sys.modules["inside"].by_lines({request!r}, {mark!r})
"""


class Remote:
    """Runs programs at a URL."""

    def __init__(self, settings: CodeSettings) -> None:
        assert settings.url, "only where it is set"
        self.settings = settings
        self.url = settings.url.rstrip("/")
        self.url += "" if self.url.endswith("/run_code") else "/run_code"

    def describe(self) -> str:
        """Runs a first program. ConfigError: it does not answer as a sandbox does."""
        try:
            outcome = self.run("print(6 * 7)", "")
            if outcome.stdout.strip() != "42":
                raise SandboxError(f"{self.url}: a first program printed {outcome.stdout!r:.80} instead of 42")
        except SandboxError as error:
            raise ConfigError(
                f"reward.code.url = {self.settings.url!r}: {error}; start the sandbox there, or set null to use this "
                "machine's own"
            ) from error
        return f"sandbox: remote, {self.url}; its isolation is its own"

    def run(self, code: str, stdin: str, prelude: bool = False) -> Outcome:
        """A whole program. SandboxError, with the URL: no answer after a few attempts."""
        if prelude:
            code = f"exec({PRELUDE!r})\ntry: exec(compile({code!r}, 'program.py', 'exec'))\nexcept SystemExit: pass"
        return _outcome(self._post(code, stdin), self.url, self.settings.output_kb << 10)

    def frames(self, request: dict[str, Any], sent: list[bytes]) -> tuple[list[bytes], Outcome]:
        """What a program for calls, or a judge, answers to these frames."""
        mark = f"frame-{secrets.token_hex(8)}:"
        request = request | {"frames": [base64.b64encode(frame).decode() for frame in sent]}
        outcome = self.run(SCRIPT.format(modules=_modules(), request=request, mark=mark), "")
        lines = [line.removeprefix(mark) for line in outcome.stdout.splitlines() if line.startswith(mark)]
        try:
            return [base64.b64decode(line) for line in lines], outcome
        except ValueError:  # a program wrote such a line
            return [], outcome

    def _post(self, code: str, stdin: str) -> Any:
        seconds = self.settings.wall_s
        body = {"code": code, "language": "python", "stdin": stdin, "run_timeout": seconds, "compile_timeout": seconds}
        body |= {"memory_limit_MB": self.settings.memory_mb, "files": {}, "fetch_files": []}
        data = json.dumps(body).encode()
        request = urllib.request.Request(self.url, data, {"Content-Type": "application/json"})
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(DELAY_S * attempt)
            try:
                with urllib.request.urlopen(request, timeout=seconds + GRACE_S) as answer:
                    answer = json.load(answer)
                if not isinstance(answer, dict) or answer.get("status") not in ("Success", "Failed"):
                    raise ValueError(f"answers {answer!r:.200}")
                return answer
            except urllib.error.HTTPError as error:
                last: Exception = error
                if error.code < 500:
                    break
            except (OSError, ValueError) as error:  # no connection, a time-out, no JSON
                last = error
        raise SandboxError(f"{self.url}: {last}")


def call_tests(remote: Remote, code: str, tests: dict[str, Any], all_of_them: bool) -> Verdict:
    """As judge.call_tests."""
    request = {"mode": "call", "parts": [code], "name": tests["name"], "prelude": True}
    words, outcome = remote.frames(request, [codec.encode([args, {}]) for args in tests["inputs"]])
    failure = _not_ready(words, outcome, tests["name"])

    def one(index: int) -> Failure | None:
        if failure or index + 1 >= len(words):
            return failure or trouble(outcome) or SILENT
        return judge_answer(words[index + 1], tests["outputs"][index])

    return count(one, len(tests["inputs"]), all_of_them)


def check_tests(remote: Remote, parts: list[str], tests: dict[str, Any], deadline: float) -> Verdict:
    """As judge.check_tests, by two requests for each call that the tests make."""
    name = tests["name"]
    program = {"mode": "call", "parts": parts, "name": name, "prelude": False}
    judge = {"mode": "judge", "stub": tests["stub"], "code": tests["code"], "name": name}
    answers: list[bytes] = []
    while time.monotonic() < deadline:
        said, outcome = remote.frames(judge, answers)
        asked = [word[1:] for word in said if word[:1] == b"C"]
        if len(asked) == len(answers):  # and then its verdict
            if len(said) == len(asked):
                return checked(trouble(outcome) or SILENT)
            return checked(failed_check(said[-1]))
        words, outcome = remote.frames(program, asked)
        failure = _not_ready(words, outcome, name)
        if not failure and len(words) != len(asked) + 1:
            failure = trouble(outcome) or SILENT
        if not failure and words[-1][:1] not in (b"V", b"E"):
            failure = FORGED
        if failure:
            return checked(failure)
        answers = [*answers, words[-1]]
    return checked(("time-out", "no time left (reward.timeout_s)"))


def _not_ready(words: list[bytes], outcome: Outcome, name: str) -> Failure | None:
    return ready_word(words[0], name) if words else trouble(outcome) or SILENT


def _outcome(answer: dict[str, Any], url: str, most: int) -> Outcome:
    result = answer.get("run_result") or {}
    stdout, stderr = (str(result.get(name) or "") for name in ("stdout", "stderr"))
    status = result.get("status")
    if status == "TimeLimitExceeded":
        return Outcome("wall", 0, stdout, stderr)
    if status not in ("Finished", "Error"):
        raise SandboxError(f"{url}: answers {answer!r:.200}")
    code = result.get("return_code")
    end = "flood" if len(stdout) + len(stderr) > most else "exit"
    return Outcome(end, code if isinstance(code, int) else int(status == "Error"), stdout, stderr)


@cache
def _modules() -> dict[str, str]:
    folder = Path(codec.__file__).parent
    return {name: (folder / f"{name}.py").read_text() for name in MODULES}
