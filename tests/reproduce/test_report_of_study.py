"""Ours beside the published numbers: every cell from scores.json files that were written by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.reproduce.report import write_report
from flowrl_mega.reproduce.study import Study

TREE: dict[str, Any] = {
    "title": "A table",
    "note": "Claims nothing.",
    "base": {"hub": "a/b", "shape": {"layers": 1, "hidden": 8, "heads": 2, "kv_heads": 1, "ffn": 8, "vocab": 9}},
    "methods": {"Ours": {"published": {"hub": "c/d"}}},
    "evaluate": {"benchmarks": ["aime24", "amc23"], "k": 2, "problems": 5},
    "published": {
        "source": "a paper",
        "rows": {
            "base": {"aime24": 10.0, "amc23": 20.0, "mean": 15.0},
            "Ours": {"aime24": 30.0, "aime24/pass@2": 40.0, "mean": 25.5},
        },
    },
}


def study(run_dir: Path, **changes: Any) -> Study:
    return Study.model_validate(TREE | {"run_dir": str(run_dir)} | changes)


def evaluated(run_dir: Path, name: str, **benchmarks: tuple[float, float]) -> None:
    """The scores of one model: avg@2 and pass@2 by benchmark, the intervals half as wide as a tenth."""
    found = {
        key: {
            "k": 2, "avg@2": avg, "avg@2/interval": [avg - 0.05, avg + 0.05], "pass@2": passed, "pass@2/interval": None,
        }
        for key, (avg, passed) in benchmarks.items()
    }  # fmt: skip
    about = {"settings": {}, "versions": {"torch": "2"}, "machine": {"cpus": 2, "gpu": None}, "ended": "2026-01-01"}
    folder = run_dir / "evaluations" / name
    folder.mkdir(parents=True)
    (folder / "scores.json").write_text(json.dumps({"benchmarks": found, **about}))


def test_every_cell(tmp_path: Path) -> None:
    evaluated(tmp_path, "base", aime24=(0.125, 0.2), amc23=(0.25, 0.3))
    evaluated(tmp_path, "Ours", aime24=(0.25, 0.5), amc23=(0.5, 0.6))
    assert write_report(study(tmp_path)) == 0
    text = (tmp_path / "report.md").read_text().splitlines()
    assert text[0] == "# A table" and text[2] == "Claims nothing."
    assert "the first 5 problems" in text[4]
    table = [line for line in text if line.startswith("|")]
    assert table[0] == "|  | aime24 | aime24/pass@2 | amc23 | mean |"
    assert [cell.strip() for cell in table[2].split("|")[1:-1]] == [
        "base", "12.50 (7.5 to 17.5); 10.00; +2.50", "20.00", "25.00 (20.0 to 30.0); 20.00; +5.00",
        "18.75; 15.00; +3.75",
    ]  # fmt: skip
    assert [cell.strip() for cell in table[3].split("|")[1:-1]] == [
        "Ours", "25.00 (20.0 to 30.0); 30.00; -5.00", "50.00; 40.00; +10.00", "50.00 (45.0 to 55.0)",
        "37.50; 25.50; +12.00",
    ]  # fmt: skip
    record = json.loads((tmp_path / "report.json").read_text())
    assert record["rows"]["Ours"]["aime24"] == {
        "ours": 25.0, "published": 30.0, "difference": -5.0, "interval": [20.0, 30.0],
    }  # fmt: skip
    assert record["commit"] is None or len(record["commit"].partition("-")[0]) == 40


def test_a_rating_is_no_share(tmp_path: Path) -> None:
    rows = {"base": {"codeforces/rating": 886.68}, "Ours": {"codeforces/rating": 1549.47}}
    evaluated(tmp_path, "base", codeforces=(0.5, 0.5))
    file = tmp_path / "evaluations" / "base" / "scores.json"
    found = json.loads(file.read_text())
    found["benchmarks"]["codeforces"]["rating"] = 900.0
    file.write_text(json.dumps(found))
    evaluate = {"benchmarks": ["codeforces"], "k": 2}
    write_report(study(tmp_path, published={"source": "s", "rows": rows}, evaluate=evaluate))
    assert "| base | 900.00; 886.68; +13.32 |" in (tmp_path / "report.md").read_text()


def test_the_hours_of_a_run_are_those_of_its_steps(tmp_path: Path) -> None:
    """Two steps of half an hour, as the trainer logs them."""
    evaluated(tmp_path, "base", aime24=(0.5, 0.5))
    (tmp_path / "methods" / "Mine").mkdir(parents=True)
    rows = [{"step": step, "perf/step_seconds": 1800.0} for step in (1, 2)]
    (tmp_path / "methods" / "Mine" / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    write_report(study(tmp_path, methods={"Mine": {"config": "any.yaml"}}, published=None))
    assert "Mine: 2 steps, 1.00 hours." in (tmp_path / "report.md").read_text()


def test_nothing_evaluated_is_no_report(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nothing has been evaluated yet; run the stage evaluate first"):
        write_report(study(tmp_path))
