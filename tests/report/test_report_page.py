"""The page tells the files' numbers, each to six digits, in a form that everyone can read."""

from __future__ import annotations

import json
import re
import statistics

import pytest
from report_runs import SETTINGS, distribution, metrics_of, report, write_lines, write_run


@pytest.fixture
def full(tmp_path):
    """A run with every file that a page is made of."""
    folder = write_run(tmp_path / "mine", metrics_of(60, mismatch__staleness=lambda step: step % 2, loss__log_z=0.5))
    write_lines(folder / "evaluation.jsonl", [{"step": step, "aime24/avg@4": step / 100} for step in (0, 30, 60)])
    write_lines(folder / "distributions.jsonl", [distribution(step, step / 10) for step in (10, 20, 30, 40, 50)])
    rows = [
        {
            "step": step,
            "prompt": "47:",
            "response": f"1+{step}",
            "reward": 1.0,
            "right": True,
            "reason": "ok",
            "kind": "sum",
        }
        for step in (59, 59, 60)
    ]
    write_lines(folder / "samples.jsonl", rows)
    start = {
        "at": "2026-11-30 01:20:00",
        "step": 0,
        "ranks": 2,
        "gpus": 2,
        "device": "NVIDIA H200",
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
    }
    (folder / "run.json").write_text(json.dumps({"starts": [start, start | {"step": 20, "gpus": 4}]}))
    return folder


def test_numbers_are_those_of_the_files(full):
    page = report(full)
    rows = [json.loads(line) for line in (full / "metrics.jsonl").read_text().splitlines()]
    shown = {row[0]: row[1:] for row in page.rows("All metrics")}
    for name in rows[0].keys() - {"step"}:
        values = [row[name] for row in rows]
        expected = (values[0], values[-1], min(values), max(values), statistics.fmean(values))
        assert shown[name] == [f"{value:.6g}" for value in expected], name
    assert shown["evaluation: aime24/avg@4"] == ["0", "0.6", "0", "0.6", "0.3"]
    assert f"{rows[0]['reward/mean']:.6g} at step 1, in the end {rows[-1]['reward/mean']:.6g};" in page.alt(
        "reward/mean"
    )


def test_cost(full):
    """The first 20 steps ran on 2 GPUs, the others on 4."""
    seconds = [row["perf/step_seconds"] for row in map(json.loads, (full / "metrics.jsonl").read_text().splitlines())]
    head, row = report(full).rows("Cost")
    of = dict(zip(head, row, strict=True))
    assert of["steps"] == "60" and of["hours"] == f"{sum(seconds) / 3600:.3g}"
    assert of["GPU hours"] == f"{(2 * sum(seconds[:20]) + 4 * sum(seconds[20:])) / 3600:.6g}"
    assert (of["device"], of["GPUs"], of["versions"], of["commit"]) == ("NVIDIA H200", "4", "torch 2.13.0", "abc")


def test_every_section_has_what_it_is_for(full):
    page = report(full)
    assert [each.attributes["id"] for each in page.all("section")] == [
        "runs", "warnings", "curves", "log-z", "residuals", "target", "health", "samples",
    ]  # fmt: skip
    links = [each.attributes["href"] for each in page.all("a") if each.is_in("nav")]
    assert links == [f"#{each.attributes['id']}" for each in page.all("section")]
    assert "Nothing looks wrong." in page.section("warnings")
    assert {"reward/mean", "aime24/avg@4", "Each prompt's log Z", "Residuals at some steps", "mismatch/staleness"} <= {
        *page.titles()
    }
    assert "loss/log_z 0.5" in page.section("curves"), "one value is told, not drawn"
    assert "distance to the group's estimate 0.25" in page.alt("Each prompt's log Z")
    assert page.alt("Residuals at some steps").endswith("steps 10, 20, 40, 50.")
    assert page.rows("Answers to 47:")[1:] == [["1+46", "1", "1", "0.5", "0.3"], ["2+45", "1", "2", "0.25", "0.15"]]
    assert [each.text for each in page.all("summary") if each.is_in("section", id="samples")] == [
        "step 60: 47: (1 answer, mean score 1)", "step 59: 47: (2 answers, mean score 1)",
    ]  # fmt: skip
    assert ["objective.beta", "2"] in page.rows("Settings of mine")


def test_quantiles_come_from_the_metrics_where_every_step_has_them(tmp_path):
    parts = {f"loss__residual_p{name}": float(name) for name in ("05", "25", "50", "75", "95")}
    page = report(write_run(tmp_path / "run", metrics_of(60, **parts)))
    assert "5, 50, 95 at step 1; 5, 50, 95 at step 60" in page.alt("Quantiles of the residual")


def test_a_page_for_everyone(full):
    """Landmarks, one h1 and no level of headings left out, ids once, a text for each picture and each input."""
    page = report(full)
    assert page.elements[0].tag == "html" and page.elements[0].attributes["lang"] == "en"
    assert all(len(page.all(tag)) == 1 for tag in ("header", "nav", "main", "h1", "title"))
    levels = [int(each.tag[1]) for each in page.all("h1", "h2", "h3", "h4")]
    assert levels[0] == 1 and all(after <= before + 1 for before, after in zip(levels, levels[1:], strict=False))
    ids = [each.attributes["id"] for each in page.elements if "id" in each.attributes]
    assert len(set(ids)) == len(ids)
    pictures = [each for each in page.all("svg") if each.attributes.get("aria-hidden") != "true"]
    assert pictures and all(each.attributes["role"] == "img" and each.attributes["aria-label"] for each in pictures)
    assert all(each.is_in("figure") for each in pictures) and len(page.all("figcaption")) == len(pictures)
    assert {each.attributes["for"] for each in page.all("label")} == {
        each.attributes["id"] for each in page.all("input")
    }
    assert page.all("a")[0].attributes["href"] == "#main", "the first link skips to the content"
    assert all(each.attributes.get("scope") for each in page.all("th"))
    assert all(each.is_in("div", **{"class": "box"}) for each in page.all("table")), "tables scroll in their own box"


def test_nothing_is_asked_of_the_network(full):
    """No address but the names of XML's vocabularies, no element that loads, and none is allowed to."""
    page = report(full)
    assert {*re.findall(r"https?://[^\"' ]+", page.html)} == {"http://www.w3.org/1999/xlink"}
    assert not page.tags().keys() & {"link", "img", "iframe", "image", "object", "embed", "base", "form"}
    assert not [
        each for each in page.elements if {"src", "srcset", "action", "onclick", "onload"} & each.attributes.keys()
    ]
    assert all(each.attributes.get("xlink:href", "#").startswith("#") for each in page.elements)
    assert "default-src 'none'" in page.html and not re.findall(r"@import|url\((?!#)", page.html)


def test_pictures_take_the_colours_of_the_page(full):
    drawn = re.findall(r"<svg.*?</svg>", report(full).html, re.S)
    assert not re.findall(r"#[0-9a-f]{6}", "".join(drawn)), "a fixed colour is invisible on one of white and black"
    assert all("currentColor" in picture for picture in drawn)


def test_seeds_are_one_method(tmp_path):
    """Runs that differ in seed and folder alone: their mean, and a standard deviation to each side."""
    level = {0: 0.2, 1: 0.5, 2: 0.8}
    seeds = [
        write_run(tmp_path / f"mine/seed_{s}", metrics_of(60, s, reward__mean=at), seed=s) for s, at in level.items()
    ]
    other = write_run(tmp_path / "other", settings=SETTINGS | {"objective": {"name": "grpo"}})
    page = report(*seeds, other)
    assert page.rows("Settings that differ") == [
        ["method", "seeds", "objective.name", "objective.beta"],
        ["name flowrl, beta 2.0", "0, 1, 2", "flowrl", "2.0"],
        ["name grpo", "0", "grpo", "–"],
    ]
    assert [each.text.split() for each in page.all("li") if each.is_in("ul", **{"class": "legend"})][:2] == [
        "name flowrl, beta 2.0 (3 seeds)".split(), "name grpo".split(),
    ]  # fmt: skip
    assert "beta 2.0, mean of 3 runs: 0.5 at step 1, in the end 0.5; between 0.5 and 0.5." in page.alt("reward/mean")


def test_a_start_for_each_seed_makes_no_other_method(tmp_path):
    """A seed's own warm start lies in its folder; a model elsewhere is another one."""
    paths = ("runs/seed_0/start", "runs/seed_1/start", "runs/large/start")
    models = [SETTINGS | {"model": {"path": path}} for path in paths]
    runs = [write_run(tmp_path / f"r/seed_{n}", seed=n, settings=of) for n, of in enumerate(models)]
    assert [row[1] for row in report(*runs).rows("Settings that differ")] == ["seeds", "0, 1", "2"]


def test_many_differences_name_a_method_by_its_folder(tmp_path):
    wide = {f"setting_{at}": at for at in range(5)}
    runs = [write_run(tmp_path / name, settings={**SETTINGS, **more}) for name, more in (("a", {}), ("b", wide))]
    assert [row[0] for row in report(*runs).rows("Settings that differ")] == ["method", "a", "b"]


def test_runs_of_unknown_settings_are_no_seeds_of_each_other(tmp_path):
    runs = [write_run(tmp_path / name) for name in ("a", "b")]
    for run in runs:
        (run / "config.yaml").unlink()
    assert [row[0] for row in report(*runs).rows("Settings that differ")] == ["method", "a", "b"]


def test_of_many_runs_the_first_are_shown_one_by_one(tmp_path):
    runs = [write_run(tmp_path / f"run_{at}", seed=at) for at in range(8)]
    for run in runs:
        write_lines(run / "samples.jsonl", [{"step": 1, "prompt": run.name, "response": "x", "reward": 0.0}])
    samples = report(*runs).section("samples")
    assert "Of the first 6 runs" in samples and "run_5" in samples and "run_6" not in samples


def test_an_evaluation_alone(tmp_path):
    """Shares in percent, as scores.md has them; what only a run has is not missed."""
    of = {
        "title": "AIME 2024",
        "problems": 30,
        "k": 4,
        "avg@4": 0.25,
        "avg@4/interval": [0.2, 0.3125],
        "pass@4": 0.5,
        "cut_off": 3,
        "no_answer": 0,
        "time_out": 0,
        "failed": 0,
        "answers": 120,
        "mean_tokens": 812.5,
    }
    (tmp_path / "scores.json").write_text(json.dumps({"benchmarks": {"aime24": of}, "ended": "2026-11-30 01:00:00"}))
    row = {
        "benchmark": "aime24",
        "problem": 3,
        "attempt": 0,
        "text": "it is 7",
        "score": 1.0,
        "right": True,
        "kind": "right",
        "why": "7",
    }
    write_lines(tmp_path / "samples.jsonl", [row])
    page = report(tmp_path)
    head, shown = page.rows("Scores")
    assert dict(zip(head, shown, strict=True)) == {
        "benchmark": "AIME 2024", "problems": "30", "avg@4": "25.00 (20.0 to 31.2)", "pass@4": "50.00",
        "cut off": "3 of 120", "no answer": "0", "time-out": "0", "failed": "0", "mean tokens": "812.5",
    }  # fmt: skip
    assert "is not there" not in page.section("runs") and not page.all("section", id="curves")
    assert "it is 7" in page.section("samples") and "aime24, problem 3" in page.section("samples")


def test_a_study_alone(tmp_path):
    cells = {"aime24": {"ours": 24.5, "published": 25.25, "difference": -0.75, "interval": [20.0, 29.0]}}
    record = {
        "study": {"published": {"source": "Table 1"}},
        "commit": "abc",
        "rows": {
            "flowrl": cells,
            "base": {"mean": {"ours": None, "published": None, "difference": None, "interval": None}},
        },
        "training": {"flowrl": {"steps": 100, "hours": 2.5}},
    }
    (tmp_path / "report.json").write_text(json.dumps(record))
    page = report(tmp_path)
    assert page.rows("Study") == [
        ["model", "aime24", "mean"], ["flowrl", "24.50 (20.0 to 29.0); 25.25; -0.75", ""], ["base", "", "not known"],
    ]  # fmt: skip
    assert "Published: Table 1. flowrl: 100 steps, 2.5 hours. Commit abc." in page.section("evaluation")


def test_equal_runs_make_equal_pages(full):
    pages = [re.sub(r"Made [^<]*", "", report(full).html) for _ in range(2)]
    assert pages[0] == pages[1]
