"""`flowrl-mega eval` with the embedded engine: on one rank or two, killed and gone on with, the same answers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from jobs import Job, write_config
from tiny_models import make
from transformers import AutoTokenizer, LlamaForCausalLM

from flowrl_mega.benchmark.answers import Answer, Place, read_answers
from flowrl_mega.data.task import task_rows

PROBLEMS, K = 70, 4  # three times 32, 32 and 6


@pytest.fixture
def settings(tmp_path: Path, tiny_llama: Path) -> dict[str, Any]:
    rows = task_rows("sums", {"lo": 10, "hi": 9 + PROBLEMS})
    every = [{**row, "kind": "sums"} for row in rows]
    assert len(every) == PROBLEMS
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in every))
    return {
        "run_dir": str(tmp_path / "run"),
        "benchmarks": [str(tmp_path / "sums.jsonl")],
        "k": K,
        "model": {"path": str(tiny_llama), "dtype": "fp32"},
        "rollout": {"max_tokens": 12, "temperature": 1.0, "top_p": 0.9},
    }


def evaluate(folder: Path, settings: dict[str, Any], world: int = 1, before: str = "", **changes: Any) -> Job:
    path = folder / "eval.yaml"
    path.write_text(yaml.safe_dump(settings | changes))
    return Job(["eval", str(path)], folder / "log", world, before)


def answers(run_dir: Path) -> dict[Place, Answer]:
    """Without their log-probs, whose last digits depend on what was computed together."""
    return {place: answer._replace(nats=None) for place, answer in sorted(read_answers(run_dir).items())}


@pytest.mark.ranks
def test_killed_and_gone_on_with_it_ends_as_if_nothing_had_been(tmp_path: Path, settings: dict[str, Any]) -> None:
    """Two ranks, both killed with some answers of the second batch written; those are not written again, and in the end
    all is as one rank leaves it that nobody disturbed."""
    whole = tmp_path / "whole"
    evaluate(tmp_path, settings, run_dir=str(whole)).run()
    run_dir = Path(settings["run_dir"])
    job = evaluate(tmp_path, settings, 2, "crashes:at_the_70th_answer", parallel={"dp": 2})
    assert job.wait() == [-9, -9]
    assert len(read_answers(run_dir)) == 2 * 69
    evaluate(tmp_path, settings, 2, parallel={"dp": 2}).run()
    assert answers(run_dir) == answers(whole) and len(answers(whole)) == PROBLEMS * K
    lines = [line for file in (run_dir / "answers").iterdir() for line in file.read_text().splitlines()]
    assert len(lines) == PROBLEMS * K, "each is written once"
    assert (run_dir / "samples.jsonl").read_bytes() == (whole / "samples.jsonl").read_bytes()
    assert (run_dir / "scores.md").read_bytes() == (whole / "scores.md").read_bytes()
    assert "avg@4" in (whole / "report.html").read_text(), "it ends with a page"


@pytest.mark.ranks
def test_the_entropy_is_that_of_transformers(tmp_path: Path, settings: dict[str, Any]) -> None:
    """-log pi of what was drawn, per token, at its temperature; and none where answers are greedy."""
    folder = make("llama", tmp_path / "model", vocab=15)  # the characters of the task, and four tokens without text
    settings["model"]["path"] = str(folder)
    drawn = {"max_tokens": 4, "temperature": 0.7, "top_p": 1.0}
    evaluate(tmp_path, settings, problems=8, rollout=drawn).run()
    run_dir = Path(settings["run_dir"])
    model = LlamaForCausalLM.from_pretrained(folder).double()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = [json.loads(line) for line in Path(settings["benchmarks"][0]).read_text().splitlines()]
    compared = 0
    for place, answer in read_answers(run_dir).items():
        prompt = tokenizer(rows[place.problem]["prompt"])["input_ids"]
        said = tokenizer(answer.text)["input_ids"] + [tokenizer.eos_token_id] * (answer.finish == "stop")
        if len(said) != answer.tokens:  # one of the tokens has no text
            continue
        with torch.no_grad():
            logits = model(torch.tensor([prompt + said])).logits[0, len(prompt) - 1 : -1]
        logp = (logits / 0.7).log_softmax(-1)[range(len(said)), said]
        assert answer.nats == pytest.approx(-float(logp.sum()), abs=1e-3)
        compared += 1
    assert compared > 5
    found = json.loads((run_dir / "scores.json").read_text())["benchmarks"]["sums"]["diversity"]["entropy"]
    every = read_answers(run_dir).values()
    assert found == pytest.approx(sum(a.nats or 0 for a in every) / sum(a.tokens or 0 for a in every))
    greedy = tmp_path / "greedy"
    evaluate(tmp_path, settings, problems=2, run_dir=str(greedy), rollout=drawn | {"temperature": 0.0}).run()
    found = json.loads((greedy / "scores.json").read_text())["benchmarks"]["sums"]["diversity"]
    assert "entropy" not in found and {answer.nats for answer in read_answers(greedy).values()} == {None}


@pytest.mark.ranks
def test_more_attempts_are_added_to_those_that_are_there(tmp_path: Path, settings: dict[str, Any]) -> None:
    evaluate(tmp_path, settings, problems=5).run()
    before = answers(run_dir := Path(settings["run_dir"]))
    evaluate(tmp_path, settings, problems=6, k=K + 2).run()
    after = answers(run_dir)
    assert len(after) == 6 * (K + 2) and before.items() <= after.items()
    texts = [[after[Place("sums", i, a)].text for a in range(K + 2)] for i in range(6)]
    assert all(len(set(of)) > 1 for of in texts), "drawn, not repeated"


@pytest.mark.ranks
def test_other_settings_are_refused_and_lose_nothing(tmp_path: Path, settings: dict[str, Any]) -> None:
    evaluate(tmp_path, settings, problems=2).run()
    before = answers(Path(settings["run_dir"]))
    job = evaluate(tmp_path, settings, problems=2, rollout=settings["rollout"] | {"temperature": 0.5})
    assert job.wait() == [2]
    said = job.log.read_text().splitlines()[-1]
    assert "rollout.temperature = 0.5" in said and "holds answers with 1.0" in said
    assert answers(Path(settings["run_dir"])) == before


@pytest.mark.ranks
def test_a_run_evaluates_on_benchmarks_as_it_trains(tmp_path: Path, settings: dict[str, Any], tiny_llama: Path) -> None:
    """Before the first step with the very scores that `eval` gives to model.path; after each with others."""
    sampling = {"max_tokens": 60, "temperature": 1.0, "top_p": 0.9}
    evaluate(tmp_path, settings, problems=20, rollout=sampling).run()
    found = json.loads((Path(settings["run_dir"]) / "scores.json").read_text())["benchmarks"]["sums"]
    benchmarks = {"names": settings["benchmarks"], "k": K, "problems": 20, **sampling}
    config = write_config(tmp_path, tiny_llama, steps=2, evaluation={"every": 1, "benchmarks": benchmarks})
    Job(["train", str(config), f"--run_dir={tmp_path / 'train'}"], tmp_path / "train.log", world=2).run()
    rows = [json.loads(line) for line in (tmp_path / "train" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [0, 1, 2]
    at_start = {name.removeprefix("sums/"): value for name, value in rows[0].items() if name.startswith("sums/")}
    assert at_start["mean_tokens"] == found["mean_tokens"] and at_start["cut_off"] == found["cut_off"] / (20 * K)
    assert at_start[f"avg@{K}"] == found[f"avg@{K}"] and 0 < at_start["cut_off"] < 1
    assert len({row["sums/mean_tokens"] for row in rows}) > 1
