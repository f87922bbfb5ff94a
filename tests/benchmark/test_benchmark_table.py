"""The table of benchmarks: published files are known by their problems, whatever their form; others are refused."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from flowrl_mega.benchmark import table
from flowrl_mega.config import ConfigError


def load(*names: str, data: Path | str | None = None, first: int | None = None, seed: int = 0) -> list[table.Problems]:
    return table.load(names, data and str(data), first, seed)


def write(file: Path, *rows: dict[str, Any]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.mark.parametrize("name", ["aime24", "aime25", "amc23", "math500", "olympiadbench", "gsm8k", "humaneval"])
def test_published_files_are_known(name: str, request: pytest.FixtureRequest) -> None:
    """The sums stand in the table; the files are others'."""
    if not (data := request.config.getoption("--data")):
        pytest.skip("needs the published files: make test DATA=DIR")
    (problems,) = load(name, data=data)
    assert problems.is_known and len(problems.rows) == table.BENCHMARKS[name].rows


def test_the_sum_is_of_the_problems_not_of_their_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Columns of other names, numbers as floats, another wording of the prompt: the same problems."""
    plain = write(tmp_path / "a.jsonl", {"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "4"})
    other = write(tmp_path / "b.jsonl", {"Question": "1+1? ", "Answer": 2.0}, {"Question": "2+2?", "Answer": 4})
    wrong = write(tmp_path / "c.jsonl", {"problem": "1+1?", "answer": "2"}, {"problem": "2+2?", "answer": "5"})
    benchmark = table.BENCHMARKS["aime24"]
    first, second, third = (table.digest(table._published(benchmark, str(file))) for file in (plain, other, wrong))
    assert first == second != third
    monkeypatch.setattr("flowrl_mega.data.prepare.problem.BOXED", "{} Answer in a box.")
    assert table.digest(table._published(benchmark, str(plain))) == first


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([{"problem": "1+1?", "answer": "2"}], "aime24.jsonl is not AIME 2024 as published: 1 problems"),
        ([{"problem": f"{i}+1?", "answer": str(i + 1)} for i in range(30)], "where 30 with the sum 48bf158fe41a8bdc"),
        ([{"text": "1+1?"}], "aime24.jsonl, record 1: has no 'problem' or 'Problem'"),
        ([{"problem": "1+1?", "answer": None}], "record 1: 'answer' is null"),
    ],
)
def test_an_altered_file_is_named(rows: list[dict[str, Any]], said: str, tmp_path: Path) -> None:
    write(tmp_path / "aime24.jsonl", *rows)
    with pytest.raises(ConfigError, match=said.replace("+", r"\+")):
        load("aime24", data=tmp_path)


def test_livecodebench_keeps_the_contests_of_v5() -> None:
    keep = table.BENCHMARKS["livecodebench"].keep
    dates = ["2024-07-31T23:59:00", "2024-08-01T00:00:00", "2025-01-31T17:00:00", "2025-02-01T00:00:00"]
    assert [keep({"contest_date": date}) for date in dates] == [False, True, True, False]


def test_a_task_of_reasoning_gym_and_a_file_of_ones_own(tmp_path: Path) -> None:
    pytest.importorskip("reasoning_gym")
    own = write(tmp_path / "fruit.jsonl", {"prompt": "Name a fruit.", "letter": "b"}, {"prompt": "Another?"})
    made, fruit = load("reasoning_gym:chain_sum", str(own), first=1, seed=3)
    assert [row["kind"] for row in made.rows] == ["reasoning_gym"] and made.name == "reasoning_gym:chain_sum"
    assert fruit.rows == [{"prompt": "Name a fruit.", "letter": "b"}] and fruit.name == "fruit"
    assert not made.is_known and not fruit.is_known
    assert load("reasoning_gym:chain_sum", first=1, seed=4)[0].rows != made.rows


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("math50", "did you mean 'math500'"),
        ("qqq", "there are: aime24, aime25"),
        ("aime24", "has no aime24.jsonl for benchmark aime24"),
    ],
)
def test_what_is_not_there(name: str, said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        load(name, data=tmp_path)


def test_a_hub_that_cannot_be_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told in one sentence with the way without it, whether it is the network that is missing or the library."""
    has_library = importlib.util.find_spec("datasets") is not None
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ConfigError) as refusal:
        load("minerva")
    said = str(refusal.value)
    why = "cannot be loaded from the hub (" if has_library else "Parquet files and Hugging Face datasets are read by"
    assert said.startswith(f"benchmarks: math-ai/minervamath: {why}") and "\n" not in said
    assert said.endswith("; give data, a folder with minerva.jsonl in it")


def test_two_of_one_name(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    files = [write(folder / "a.jsonl", {"prompt": "1+1?"}) for folder in (tmp_path, tmp_path / "b")]
    with pytest.raises(ConfigError, match="two are called 'a'"):
        load(*map(str, files))
