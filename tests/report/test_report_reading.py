"""Bad input: what can be read is shown, what cannot is told, and a folder that is no run is refused."""

from __future__ import annotations

import json
import random

import pytest
from report_runs import distribution, metrics_of, report, write_lines, write_run

from flowrl_mega import cli
from flowrl_mega.monitor.metric_names import RENAMED
from flowrl_mega.report.records import BLOCK, Columns, Reader


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_text("")])
def test_a_folder_that_is_no_run(tmp_path, capsys, make):
    path = tmp_path / "other"
    make(path)
    assert cli.main(["report", str(path)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"flowrl-mega: {path}: no") and "give the run_dir of a run" in said
    assert "no such folder" in said or "none of metrics.jsonl, evaluation.jsonl, config.yaml" in said


def test_other_mistakes(tmp_path, capsys):
    run = write_run(tmp_path / "run")
    for arguments, words in (
        ([run, run], f"{run}: given twice"),
        ([run, "--out", tmp_path], f"--out {tmp_path}: is a folder"),
        ([run, "--out", tmp_path / "no/page.html"], "there is no folder"),
        ([run, "--steps=3"], "--steps=3: no option of report"),
    ):
        assert cli.main(["report", *map(str, arguments)]) == 2
        assert words in capsys.readouterr().err
    for seconds in ("0", "-1", "nan", "inf", str(run)):
        with pytest.raises(SystemExit):
            cli.main(["report", str(run), f"--watch={seconds}"])
    assert "put RUN before --watch" in capsys.readouterr().err
    assert not (run / "report.html").exists()


def test_a_line_that_was_cut_off_and_lines_of_something_else(tmp_path):
    run = write_run(tmp_path / "run")
    lines = (run / "metrics.jsonl").read_text().splitlines()
    junk = ["", "null", "[1]", "{", '{"no": "step"}', '{"step": "7", "reward/mean": 1}', "[" * 100_000, "\xff\xfe"]
    (run / "metrics.jsonl").write_text("\n".join([*lines[:30], *junk, *lines[30:], lines[-1][:40]]))
    page = report(run)
    assert "metrics.jsonl: the last line is half written and left out." in page.section("runs")
    assert "metrics.jsonl: lines that are no record are left out: 5, the first is line 32." in page.section("runs")
    assert page.rows("Cost")[1][1] == "60"


def test_metrics_of_every_kind(tmp_path):
    """What is no finite number is as null; the others of the same metric count."""
    odd = ["text", [1, 2], {"a": 1}, True, 10**400, float("nan"), float("inf"), None]
    rows = [{"step": step, "mine": value} for step, value in enumerate([*odd, 1.5, 2.5], start=1)]
    columns = Columns(rows)
    assert columns.known("mine").tolist() == [1.0, 1.5, 2.5] and len(columns.nulls["mine"]) == 7
    write_lines(tmp_path / "metrics.jsonl", rows)
    assert report(tmp_path).rows("All metrics")[1] == ["mine", "1", "2.5", "1", "2.5", "1.66667"]


def test_a_run_of_an_earlier_version(tmp_path):
    """Old names of metrics are read under the new ones; files that it did not write are told."""
    new = {old: name for old, name in RENAMED.items()}
    old = {name: old for old, name in new.items()}
    rows = metrics_of(60)
    write_lines(
        tmp_path / "metrics.jsonl", [{old.get(name, name): value for name, value in row.items()} for row in rows]
    )
    page = report(tmp_path)
    assert f"{rows[0]['reward/mean']:.6g} at step 1" in page.alt("reward/mean")
    told = page.section("runs")
    assert all(
        f"{name} is not there" in told
        for name in ("config.yaml", "evaluation.jsonl", "samples.jsonl", "distributions.jsonl")
    )
    assert "Versions and hardware are not known: there is no run.json." in told


def test_a_run_that_has_not_made_a_step(tmp_path):
    (tmp_path / "config.yaml").write_text("seed: 3\n")
    page = report(tmp_path)
    assert "metrics.jsonl is not there." in page.section("runs") and not page.all("section", id="curves")
    (tmp_path / "metrics.jsonl").write_text("")
    assert not report(tmp_path).all("section", id="curves")


def test_files_that_hold_something_else(tmp_path):
    run = write_run(tmp_path / "run")
    for name in ("run.json", "scores.json", "report.json", "evaluation.jsonl", "samples.jsonl", "distributions.jsonl"):
        for text in (
            "",
            "\x00",
            "[]",
            "7",
            "{}",
            '{"starts": 3, "benchmarks": [], "rows": 1, "step": 1, "residual": [], "prompts": {}}',
        ):
            (run / name).write_text(text)
            assert "Nothing looks wrong." in report(run).section("warnings"), (name, text)
        (run / name).unlink()
        (run / name).mkdir()  # no file at all
    for text in ("[1, 2]", "a: [", "\x00", "- " * 5000, "3"):
        (run / "config.yaml").write_text(text)
        assert "config.yaml cannot be read: the settings are not known." in report(run).section("runs")


def test_distributions_that_lack_parts(tmp_path):
    """Only the parts that are whole are drawn; none of the others is an error."""
    run = write_run(tmp_path / "run")
    good = distribution(10)
    records = [good]
    for part in ("residual", "log_z", "prompts"):
        for wrong in (
            None,
            3,
            [],
            {},
            [1],
            "x",
            [None],
            [{"answers": 3}],
            {"edges": [1], "counts": [1]},
            {"logged": [None], "group": ["x"]},
            {"edges": [2, 1], "counts": [1], "quantiles": {"0.5": None}},
        ):
            records.append({**good, "step": len(records) + 10, part: wrong})
    records += [
        {"step": 90, "prompts": [{"prompt": 5, "answers": [{"text": None, "target": 3.0, "empirical": "x"}, 4]}]},
        {"prompts": []},
    ]
    write_lines(run / "distributions.jsonl", records)
    page = report(run)
    assert {"Each prompt's log Z", "Mean over prompts", "Residuals at some steps", "Quantiles of the residual"} <= {
        *page.titles()
    }
    assert page.rows("Answers to 5")[1:] == [["None", "–", "–", "–", "–"]]


def test_the_last_lines_of_a_file(tmp_path):
    """Against reading it whole: lines of all lengths, over the borders of blocks, with and without a last line end."""
    draw = random.Random(0)
    rows = [{"at": at, "text": "x" * draw.choice([0, 10, 1000, BLOCK // 3, 2 * BLOCK])} for at in range(40)]
    for end in ("", "\n", "\n\n"):
        (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)) + end)
        for count in (1, 2, 17, 25):
            assert Reader(tmp_path).last_records("rows.jsonl", count) == rows[-count:]
    write_lines(tmp_path / "rows.jsonl", rows[:3])
    assert Reader(tmp_path).last_records("rows.jsonl", 99) == rows[:3]


def test_a_large_file_is_read_in_part(tmp_path):
    """From the first line to the last one."""
    rows = [{"at": at} for at in range(1000)]
    write_lines(tmp_path / "rows.jsonl", rows)
    reader = Reader(tmp_path)
    found = [
        row["at"] for row in reader.records("rows.jsonl", most_bytes=(tmp_path / "rows.jsonl").stat().st_size // 7)
    ]
    assert found == [*range(0, 1000, 8), 999] and reader.notes == ["rows.jsonl is large: one line in 8 is read."]
