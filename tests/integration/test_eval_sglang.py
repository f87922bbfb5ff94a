"""`flowrl-mega eval` with the real SGLang: whoever writes the answers, greedy ones are the same."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jobs import Job
from sglang_server import SMALL, server_python, start_server
from tiny_models import make
from transformers import AutoTokenizer

from flowrl_mega.benchmark.answers import read_answers
from flowrl_mega.data.task import task_rows

pytestmark = [pytest.mark.integration, pytest.mark.servers, pytest.mark.timeout(400)]
K, PROBLEMS = 2, 9
TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}{% endfor %}"  # the characters of a prompt, as they are
)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with a chat template, which chat servers ask for."""
    folder = make("llama", tmp_path_factory.mktemp("model"), vocab=15)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    fleet = start_server(tmp_path_factory.mktemp("server"), model)
    yield fleet.urls[0]
    fleet.close()


def evaluate(folder: Path, settings: dict[str, Any], name: str, **changes: Any) -> Path:
    """The folder of an evaluation with these settings."""
    path, run_dir = folder / f"{name}.yaml", folder / name
    path.write_text(json.dumps(settings | {"run_dir": str(run_dir)} | changes))
    Job(["eval", str(path)], folder / f"{name}.log", world=1).run()
    return run_dir


@pytest.fixture
def settings(tmp_path: Path, model: Path) -> dict[str, Any]:
    rows = task_rows("sums", {"lo": 10, "hi": 9 + PROBLEMS})
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({**row, "kind": "sums"}) + "\n" for row in rows))
    greedy = {"max_tokens": 12, "temperature": 0.0, "top_p": 1.0}
    of_model = {"model": {"path": str(model), "dtype": "fp32"}, "rollout": greedy}
    return {"benchmarks": [str(tmp_path / "sums.jsonl")], "k": K, **of_model}


def test_the_same_answers_by_every_engine(tmp_path: Path, settings: dict[str, Any], url: str) -> None:
    """In this process, by SGLang's own protocol and by OpenAI's; the template is applied here or by the server."""
    rollout = settings["rollout"]
    own = evaluate(tmp_path, settings, "own")
    attached = evaluate(tmp_path, settings, "attached", rollout=rollout | {"engine": "sglang", "servers": [url]})
    chat_settings = {name: value for name, value in settings.items() if name != "model"}
    chat = evaluate(tmp_path, chat_settings, "chat", rollout=rollout | {"engine": "chat", "servers": [url]})
    found = [read_answers(run_dir) for run_dir in (own, attached, chat)]
    assert len(found[0]) == PROBLEMS * K
    texts = [{place: (answer.text, answer.finish) for place, answer in of.items()} for of in found]
    assert texts[0] == texts[1] == texts[2]
    assert len({text for text, _ in texts[0].values()}) > 1, "not the same to every problem"
    assert {a.tokens for a in found[0].values()} == {a.tokens for a in found[1].values()}
    assert (own / "scores.md").read_text() == (attached / "scores.md").read_text()


def test_drawn_answers_differ_and_missing_ones_are_written(tmp_path: Path, settings: dict[str, Any], url: str) -> None:
    rollout = settings["rollout"] | {"engine": "sglang", "servers": [url], "temperature": 1.0}
    run_dir = evaluate(tmp_path, settings, "drawn", rollout=rollout, problems=4)
    before = read_answers(run_dir)
    assert read_answers(evaluate(tmp_path, settings, "drawn", rollout=rollout, k=8)).items() >= before.items()
    answers = read_answers(run_dir)
    assert len(answers) == PROBLEMS * 8
    assert all(len({answers[place._replace(attempt=a)].text for a in range(8)}) > 1 for place in answers)


def test_a_megatron_checkpoint_behind_a_server_that_is_started_here(tmp_path: Path, settings: dict[str, Any]) -> None:
    """It is converted once, in the run folder; its answers are those of the embedded engine on the checkpoint."""
    from flowrl_mega.checkpoint import hf_to_megatron

    checkpoint = tmp_path / "checkpoint"
    hf_to_megatron(Path(settings["model"]["path"]), checkpoint, show=False)
    settings["model"]["path"] = str(checkpoint)
    servers = {"engine": "sglang", "python": server_python(), "server_args": SMALL, "start_timeout_s": 300}
    served = evaluate(tmp_path, settings, "served", rollout=settings["rollout"] | servers)
    own = evaluate(tmp_path, settings, "own")
    assert (served / "samples.jsonl").read_bytes() == (own / "samples.jsonl").read_bytes()
    assert (served / "hf" / "config.json").exists()


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"engine": "chat", "name": "other"}, "model.name = 'other': http"),
        ({"engine": "sglang", "vocab": 17}, "serves another model"),
        ({"engine": "sglang", "max_tokens": 500}, "but the servers take 128"),
    ],
)
def test_a_server_of_another_model_is_refused(
    changes: dict[str, Any], said: str, tmp_path: Path, settings: dict[str, Any], url: str
) -> None:
    if changes["engine"] == "chat":
        settings["model"] = {"name": changes["name"]}
    if "vocab" in changes:
        settings["model"]["path"] = str(make("llama", tmp_path / "other", vocab=changes["vocab"]))
    rollout = settings["rollout"] | {"engine": changes["engine"], "servers": [url]}
    rollout["max_tokens"] = changes.get("max_tokens", 12)
    path = tmp_path / "eval.yaml"
    path.write_text(json.dumps(settings | {"run_dir": str(tmp_path / "run"), "rollout": rollout}))
    job = Job(["eval", str(path)], tmp_path / "log", world=1)
    assert job.wait() == [2]
    assert said in job.log.read_text().splitlines()[-1]
