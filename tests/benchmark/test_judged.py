"""The judge behind a chat server: one call a problem with all its attempts, each verdict kept, nonsense no number."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from flowrl_mega.benchmark.judged import FILE, Judge
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.benchmark.samples import Sample
from flowrl_mega.benchmark.scores import scores, table
from flowrl_mega.config import ConfigError
from flowrl_mega.config_eval import JudgeSettings

PROBLEMS = Problems("own", "own", [{"prompt": "What is 1+1?"}, {"prompt": [{"content": "And 2+2?"}]}], "", "", False)
SAMPLES = [
    Sample("own", i, a, f"way {i}.{a}", 1, "stop", None, 0.0, False, "wrong", "") for i in range(2) for a in range(2)
]


@pytest.fixture
def serve() -> Iterator[Callable[[list[Any]], tuple[str, list[Any]]]]:
    """Serves these answers, in order, at the URL; the requests that came. An int is an HTTP status."""
    servers = []

    def start(answers: list[Any]) -> tuple[str, list[Any]]:
        asked: list[Any] = []

        class Handler(BaseHTTPRequestHandler):
            def log_message(self, *of: Any) -> None: ...

            def do_GET(self) -> None:
                self._answer({"data": [{"id": "judge-1"}]})

            def do_POST(self) -> None:
                asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                said = answers[len(asked) - 1]
                message = {"choices": [{"finish_reason": "stop", "message": {"content": said}}]}
                self._answer(message, said if isinstance(said, int) else 200)

            def _answer(self, body: Any, status: int = 200) -> None:
                self.send_response(status)
                self.end_headers()
                self.wfile.write(json.dumps(body).encode())

        servers.append(ThreadingHTTPServer(("127.0.0.1", 0), Handler))
        Thread(target=servers[-1].serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{servers[-1].server_port}", asked

    yield start
    for server in servers:
        server.shutdown()


def judged(run_dir: Path, url: str, samples: list[Sample] = SAMPLES, **settings: Any) -> dict[str, Any]:
    judge = Judge(JudgeSettings(url=url, concurrency=1, **settings), run_dir)
    try:
        return judge.scores(PROBLEMS, samples)
    finally:
        judge.close()


def test_one_call_a_problem_and_each_verdict_is_kept(tmp_path: Path, serve: Any) -> None:
    """Run again, nobody is asked; with one other attempt, one problem is."""
    url, asked = serve(["4", "I would rather not say.", "2"])
    found = judged(tmp_path, url)
    assert found == {"model": "judge-1", "mean": 4.0, "no_verdict": 1, "verdicts": [4, None]}
    first = asked[0]["messages"][0]["content"]
    assert all(text in first for text in ("What is 1+1?", "way 0.0", "way 0.1")) and "way 1" not in first
    assert asked[0]["temperature"] == 0 and asked[0]["model"] == "judge-1"
    assert judged(tmp_path, url) == found and len(asked) == 2
    other = [*SAMPLES[:3], SAMPLES[3]._replace(text="another way")]
    assert judged(tmp_path, url, other)["verdicts"] == [4, 2] and len(asked) == 3


def test_what_was_said_before_a_kill_or_a_refusal_is_kept(tmp_path: Path, serve: Any) -> None:
    url, asked = serve(["5", 400, "1"])
    with pytest.raises(ConfigError, match="400"):
        judged(tmp_path, url)
    file = tmp_path / FILE
    file.write_bytes(file.read_bytes() + b'{"asked": "half a li')
    assert judged(tmp_path, url)["verdicts"] == [5, 1] and len(asked) == 3


def test_in_the_table(tmp_path: Path, serve: Any) -> None:
    url, _ = serve(["3", "x"])
    found = scores(SAMPLES, 2) | {"judge": judged(tmp_path, url)}
    assert table({"own": found}).splitlines()[-1] == (
        "own: diversity 3.00 of 5, by judge-1 (1 of 2 problems without a verdict)"
    )


def test_a_model_that_it_does_not_serve(tmp_path: Path, serve: Any) -> None:
    url, asked = serve([])
    with pytest.raises(ConfigError, match=r"judge.model = 'other': http.* serves judge-1"):
        judged(tmp_path, url, model="other")
    assert not asked
