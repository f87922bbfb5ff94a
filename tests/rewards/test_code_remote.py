"""A remote sandbox by URL: a real HTTP server that speaks SandboxFusion's /run_code and runs programs in our own."""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from test_code import CHECK, SUM, TWICE, fenced

from flowrl_mega.config import CodeSettings, ConfigError, RewardSettings
from flowrl_mega.rewards import code
from flowrl_mega.rewards.code import remote
from flowrl_mega.rewards.sandbox.client import Sandbox, SandboxError

MARK = "# the program"
EXPECTED = {"stdin": "42", "call": "abab", "check": "== 3"}  # what only the tests say
LIMITS = CodeSettings(wall_s=60.0, cpu_s=2, memory_mb=256, output_kb=512)


class Handler(BaseHTTPRequestHandler):
    """`faults` are answered first, one a request: a status, a text instead of JSON, or "hang up"."""

    def do_POST(self):
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, request))
        fault = self.server.faults.pop(0) if self.server.faults else None
        if fault == "hang up":
            self.connection.close()
            return
        if isinstance(fault, int):
            self.answer(fault, b"{}")
            return
        self.answer(200, fault.encode() if fault else json.dumps(self.run(request)).encode())

    def run(self, request):
        outcome = self.server.sandbox.run(request["code"], request["stdin"])
        ok = outcome.end == "exit" and outcome.code == 0
        status = "TimeLimitExceeded" if outcome.end in ("wall", "cpu") else "Finished"
        result = {"status": status, "return_code": outcome.code, "stdout": outcome.stdout, "stderr": outcome.stderr}
        return {"status": "Success" if ok else "Failed", "compile_result": None, "run_result": result}

    def answer(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def server():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.sandbox, server.faults, server.seen = Sandbox(LIMITS, "process"), [], []
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()
    server.sandbox.close()


@pytest.fixture
def settings(server, monkeypatch):
    monkeypatch.setattr(remote, "DELAY_S", 0.01)
    server.faults.clear()
    server.seen.clear()
    url = f"http://127.0.0.1:{server.server_port}"
    return RewardSettings(function="-", code=LIMITS.model_copy(update={"url": url}))


def scored(tests, source, settings):
    return code.score({"tests": tests}, fenced(source), settings)


@pytest.mark.slow
@pytest.mark.parametrize(
    "tests, source, reward, kind",
    [
        (SUM, "print(sum(map(int, input().split())))", 1.0, "right"),
        (SUM, "from __future__ import annotations\nprint(reduce(add, map(int, input().split())))", 1.0, "right"),
        (SUM, "print(3)", 0.0, "wrong"),
        (SUM, "1 // 0", 0.0, "crash"),
        (SUM, "while True: pass", 0.0, "time-out"),
        (TWICE, "def twice(x):\n    print('noise')\n    return x + x", 1.0, "right"),
        (TWICE, "def twice(x):\n    return x", 0.0, "wrong"),
        (TWICE, "def twice(x):\n    return 1 // 0", 0.0, "crash"),
        (TWICE, "def double(x):\n    return x", 0.0, "wrong"),
        (TWICE, "import os\nos._exit(0)", 0.0, "crash"),
        (CHECK, "def half(n):\n    return floor(n / 2)", 1.0, "right"),
        (CHECK, "def half(n):\n    return n", 0.0, "wrong"),
        (CHECK, "def half(n):\n    return 1 // 0", 0.0, "crash"),
        (CHECK, "import os\ndef half(n):\n    os._exit(0)", 0.0, "crash"),
        (CHECK, "def half(n):\n    while True:\n        pass", 0.0, "time-out"),
        (
            CHECK,
            "class A:\n    def __eq__(self, o):\n        return True\n\ndef half(n):\n    return A()",
            0.0,
            "wrong",
        ),
    ],
)
def test_verdicts_as_here(server, settings, tests, source, reward, kind):
    """All three forms; and a request with the program in it has nothing of what is expected of it."""
    result = scored(tests, f"{source}\n{MARK}", settings)
    assert (result[0], result[2]) == (reward, kind), result[1]
    for path, request in server.seen:
        assert path == "/run_code" and request["language"] == "python" and request["run_timeout"] == LIMITS.wall_s
    programs = [json.dumps(request) for _, request in server.seen if MARK in request["code"]]
    assert programs
    assert not [request for request in programs if EXPECTED[tests["type"]] in request]


def test_a_check_of_several_calls(settings):
    """Replayed from the start for each: the program's own state is as it would be."""
    tests = CHECK | {"code": "def check(candidate):\n    assert [candidate(n) for n in (2, 4)] == [1, 3]\n"}
    counter = "count = 0\ndef half(n):\n    global count\n    count += 1\n    return 2 * count - 1"
    assert scored(tests, counter, settings)[0] == 1.0


@pytest.mark.parametrize("fault", [503, 500, "no JSON", "[]", '{"status": "SandboxError"}', "hang up"])
def test_a_passing_fault_is_tried_again(server, settings, fault):
    server.faults[:] = [fault, fault]
    assert scored(CHECK, "def half(n):\n    return n // 2", settings)[0] == 1.0


@pytest.mark.parametrize("fault", [503, "no JSON", '{"status": "SandboxError"}', '{"status": "Success"}', "hang up"])
def test_a_lasting_fault_is_a_failed_call(server, settings, fault):
    """Never a verdict; the message names the URL."""
    server.faults[:] = [fault] * 3
    with pytest.raises(SandboxError, match="http://127.0.0.1:"):
        scored(SUM, "print(3)", settings)


def test_a_refusal_is_not_tried_again(server, settings):
    """4xx: the request will not become better."""
    server.faults[:] = [404]
    with pytest.raises(SandboxError, match="404"):
        scored(SUM, "print(3)", settings)
    assert len(server.seen) == 1


def test_said_at_start(server, settings):
    """What is active, or that nobody answers."""
    assert code.describe(settings).startswith("sandbox: remote, http://127.0.0.1:")
    server.faults[:] = ["{}"] * 3
    with pytest.raises(ConfigError, match="reward.code.url = 'http"):
        code.describe(settings)
