"""Scores of answers that were written by hand, against figures that were worked out by hand."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
from jobs import Job

from flowrl_mega.benchmark.answers import Answer, AnswerFile, Place
from flowrl_mega.benchmark.samples import Sample, vote
from flowrl_mega.benchmark.scores import scores, table

GOLD = ["4", "1/2", "7"]
# Right, wrong, without an answer, cut off in its box; two that are right in another form, wrong, of two boxes the last;
# empty, twice the same wrong one, right.
TEXTS = [
    [r"So \boxed{4}.", r"\boxed{5}", "I cannot say.", r"It is \boxed{"],
    [r"\boxed{\frac12}", r"\boxed{0.5}", r"\boxed{3}", r"\boxed{3}, no: it must be \boxed{1/2}"],
    ["", r"\boxed{8}", r"Surely \boxed{8}", r"\boxed{7}"],
]
CUT_OFF = (0, 3)
EXPECTED = {
    "problems": 3, "k": 4, "answers": 12, "cut_off": 1, "no_answer": 3, "time_out": 0, "failed": 0,
    "avg@4": Fraction(1 + 3 + 1, 12), "pass@1": Fraction(1 + 3 + 1, 12), "mean_score": Fraction(5, 12),
    "pass@2": (Fraction(1, 2) + 1 + Fraction(1, 2)) / 3,  # 1 - C(3, 2) / C(4, 2)
    "pass@4": Fraction(1), "mean_tokens": Fraction(5),
    "maj@4": (Fraction(1, 2) + 1 + 0) / 3,  # 4 against 5; 1/2 against 3; 8 against 7
}  # fmt: skip


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A folder with those answers, as an engine would have left it, and the settings beside it."""
    rows = [{"prompt": f"problem {i}", "kind": "math", "answer": gold} for i, gold in enumerate(GOLD)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"run_dir": str(tmp_path / "run"), "benchmarks": [str(tmp_path / "own.jsonl")], "k": 4}
    settings |= {"rollout": {"engine": "chat", "servers": ["http://127.0.0.1:9"]}, "reward": {"workers": 1}}
    (tmp_path / "eval.yaml").write_text(json.dumps(settings))
    file = AnswerFile(tmp_path / "run", 0)
    for i, texts in enumerate(TEXTS):
        for attempt, text in enumerate(texts):
            file.add(Place("own", i, attempt), Answer(text, 5, "length" if (i, attempt) == CUT_OFF else "stop"))
    file.close()
    return tmp_path / "run"


def regrade(run_dir: Path, *overrides: str, codes: tuple[int, ...] = (0,)) -> str:
    log = run_dir.parent / "log"
    log.unlink(missing_ok=True)
    job = Job(["eval", str(run_dir.parent / "eval.yaml"), "--regrade", *overrides], log, world=1)
    assert tuple(job.wait()) == codes, log.read_text()
    return log.read_text()


@pytest.mark.ranks
def test_stored_answers_give_the_exact_table(run_dir: Path) -> None:
    """Graded by math-verify in a worker; told on the terminal and in Markdown; the same when graded again."""
    said = regrade(run_dir)
    found = json.loads((run_dir / "scores.json").read_text())["benchmarks"]["own"]
    assert {name: pytest.approx(float(value), abs=1e-12) for name, value in EXPECTED.items()} == {
        name: found[name] for name in EXPECTED
    }
    low, high = found["avg@4/interval"]
    assert 0.25 <= low < found["avg@4"] < high <= 0.75, "of three problems with 1/4, 3/4 and 1/4"
    assert found["diversity"]["distinct_answers"] == 2
    written = (run_dir / "scores.md").read_text()
    assert written in said and "| own | 3 | 41.67 (25.0 to " in written
    assert "| 66.67 | 100.00 | 50.00 | 1 of 12 | 3 of 12 | 0 | 0 | 5 |" in written
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [s["right"] for s in samples] == [True, False, False, False, True, True, False, True, *[False] * 3, True]
    assert [s["kind"] for s in samples[:4]] == ["right", "wrong", "no answer", "no answer"]
    assert "5" in samples[1]["why"] and samples[5]["vote"] == "1/2"
    kept = {name: (run_dir / name).read_bytes() for name in ("samples.jsonl", "scores.md")}
    regrade(run_dir)
    assert kept == {name: (run_dir / name).read_bytes() for name in kept}, "the same samples, the same scores"


@pytest.mark.ranks
def test_fewer_attempts_and_problems_than_are_stored(run_dir: Path) -> None:
    regrade(run_dir, "--k=2", "--problems=2")
    found = json.loads((run_dir / "scores.json").read_text())["benchmarks"]["own"]
    assert (found["problems"], found["avg@2"], found["pass@2"]) == (2, 0.75, 1.0)
    said = regrade(run_dir, "--k=5", codes=(2,))
    assert "k = 5" in said and "holds 4 answers to problem 0 of own" in said


def sample(problem: int, right: bool = False, **of: Any) -> Sample:
    values = dict(text="", tokens=1, finish="stop", vote=None, score=float(right), kind="wrong", why="")
    return Sample("b", problem, 0, right=right, **(values | of))


def test_what_was_not_graded_is_told_apart() -> None:
    """Answers whose grading took too long, or broke, count as wrong and stand beside them."""
    found = scores([sample(0, kind="time-out"), sample(1, kind="error"), sample(2, True, kind="right")], 1)
    assert (found["time_out"], found["failed"], found["no_answer"]) == (1, 1, 0)
    assert found["avg@1"] == pytest.approx(1 / 3) and "maj@1" not in found, "nobody votes"
    assert "| 1 of 3 | 1 of 3 |" in table({"b": found})


def test_what_compares_answers_with_each_other_is_asked_for() -> None:
    """Two answers, the same or without a word in common, as the library and the formula have it."""
    pytest.importorskip("sacrebleu")
    texts = ["one two three four five", "six seven eight nine ten"]
    pairs = [
        [sample(i, text=text)._replace(attempt=a) for a, text in enumerate(of)]
        for i, of in enumerate(([texts[0]] * 2, texts))
    ]
    found = scores([s for of in pairs for s in of], 2, slow=True)["diversity"]
    assert found["vendi"] == pytest.approx((1 + 2) / 2)
    assert found["self_bleu"] == pytest.approx(1 / 2, abs=0.05)
    assert "vendi" not in scores(pairs[0], 2)["diversity"]


def test_the_mean_over_benchmarks_is_of_benchmarks() -> None:
    """Each counts the same, however many problems it has, as in the paper's tables."""
    one, four = scores([sample(0, True, vote="x")], 1), scores([sample(i, vote="x") for i in range(4)], 1)
    assert table({"one": one, "four": four}).splitlines()[-1].startswith("| mean |  | 50.00 | 50.00 |")


@pytest.mark.parametrize(
    ("row", "text", "right", "said"),
    [
        ({"kind": "math", "answer": "1/2"}, r"\boxed{0.5}", True, "1/2"),
        ({"kind": "math", "answer": "1/2"}, r"\boxed{ 3 \text{ cm} }", False, "3"),
        ({"kind": "math", "answer": "1/2"}, "no answer", False, None),
        ({"kind": "math_dapo", "answer": "12"}, "Answer: 1,200", False, "1200"),
        ({"kind": "code", "tests": {}}, "```python\nprint(1)\n```", True, None),
    ],
)
def test_what_an_answer_votes_for(row: dict[str, Any], text: str, right: bool, said: str | None) -> None:
    """Right ones all alike, in whatever form; programs do not vote."""
    assert vote(row, text, right) == said
