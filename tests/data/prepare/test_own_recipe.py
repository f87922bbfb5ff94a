"""--recipe path/to/file.py:function: a recipe from outside the package, as docs/data.md shows it."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerBase

from flowrl_mega.data.store import MappedStore

sys.path.insert(0, str(Path(__file__).parents[3] / "tools"))
import prepare_data  # noqa: E402

RECIPE = """
from flowrl_mega.data.prepare.problem import BAD_ANSWER, BadRow, Problem, math, text_of

def riddles(record, wording):
    if record["solved_by"] == 0:
        raise BadRow(BAD_ANSWER, "nobody has solved it")
    return math(text_of(record, "riddle"), record["solution"][0], wording)

def digits(record, wording):
    return Problem(record["text"], {"prompt": f"{record['text']}:", "digit": record["text"][0]})

def no_prompt(record, wording):
    return Problem("text", {})

def a_row(record, wording):
    return {"prompt": "x"}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "recipes.py").write_text(RECIPE)
    return tmp_path


def prepared(folder: Path, model: Path, function: str, *records: dict[str, Any]) -> int:
    (folder / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    arguments = ["--input", str(folder / "in.jsonl"), "--model", str(model), "--out", str(folder / "store")]
    return prepare_data.main(["--recipe", f"{folder}/recipes.py:{function}", *arguments])


def test_a_store_from_a_recipe_in_a_file(
    folder: Path, model_folder: Path, tokenizer: PreTrainedTokenizerBase, capsys: pytest.CaptureFixture[str]
) -> None:
    """What it refuses, and records on which it fails, are counted and listed like those of other recipes."""
    good = {"riddle": "How many is half of four?", "solution": ["2.0"], "solved_by": 9}
    unsolved, odd = good | {"riddle": "Why?", "solved_by": 0}, {"solved_by": 1, "riddle": "How?"}
    assert prepared(folder, model_folder, "riddles", good, unsolved, odd) == 0
    assert "1 of 3 rows kept" in capsys.readouterr().out
    store = MappedStore(folder / "store")
    prompt = f"{good['riddle']}\n\nPlease reason step by step, and put your final answer within \\boxed{{}}."
    row = {"id": "riddles/train/0", "task": "riddles", "prompt": prompt, "kind": "math", "answer": "2"}
    assert store[0].row == row and store[0].token_ids == tokenizer(prompt)["input_ids"]
    assert store.header["made"]["recipe"] == "recipes.py:riddles"
    listed = [json.loads(line) for line in (folder / "store" / "refused.jsonl").read_text().splitlines()]
    assert [(entry["reason"], entry["detail"]) for entry in listed] == [
        ("bad answer", "nobody has solved it"),
        ("broken", "the recipe failed (KeyError: 'solution')"),
    ]


def test_a_row_with_keys_of_its_own(folder: Path, model_folder: Path) -> None:
    """For a reward of the user's: no kind, and any other keys."""
    assert prepared(folder, model_folder, "digits", {"text": "7"}) == 0
    row = {"id": "digits/train/0", "task": "digits", "prompt": "7:", "digit": "7"}
    assert MappedStore(folder / "store")[0].row == row


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("riddle", "did you mean 'riddles'?"),
        ("BAD_ANSWER", "is a str; must be a function"),
        ("a_row", "returned a dict; must return a Problem"),
        ("no_prompt", "has no 'prompt'"),
    ],
)
def test_what_is_no_recipe(
    function: str, message: str, folder: Path, model_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exit code 2 and no store."""
    assert prepared(folder, model_folder, function, {"text": "7"}) == 2
    assert message in capsys.readouterr().err
    assert not (folder / "store").exists()
