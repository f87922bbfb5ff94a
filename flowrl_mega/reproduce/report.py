"""The report of a study: published number, ours, difference and interval per cell, and what it takes to judge them."""

from __future__ import annotations

import json
from typing import Any

from flowrl_mega.benchmark.run import SCORES
from flowrl_mega.config import ConfigError
from flowrl_mega.monitor.machine import commit
from flowrl_mega.monitor.run_folder import METRICS, STARTS, RunFolder
from flowrl_mega.reproduce.study import Published, Study
from flowrl_mega.whole_file import write_whole

UNSCALED = ("rating", "percentile")  # the others are shares, told in percent


def write_report(study: Study) -> int:
    """RUN/report.md and report.json of all evaluations that are there; returns 0."""
    scores = {name: found for name in study.evaluations() if (found := _scores(study, name))}
    if not scores:
        raise ConfigError(f"{study.run_dir}: nothing has been evaluated yet; run the stage evaluate first")
    rows = {name: row_of(name, of, study.published) for name, of in scores.items()}
    settings = {
        name: {"settings": of["settings"], "versions": of["versions"], "machine": of["machine"], "ended": of["ended"]}
        for name, of in scores.items()
    }
    record = {
        "study": study.model_dump(mode="json"),
        "commit": commit(),
        "rows": rows,
        "training": {name: _training(study, name) for name in study.trained()},
        "evaluations": settings,
    }
    write_whole(study.folder("report.json"), json.dumps(record, indent=1, ensure_ascii=False) + "\n")
    text = markdown(study, rows, record)
    write_whole(study.folder("report.md"), text)
    print(text)
    return 0


def row_of(name: str, scores: dict[str, Any], published: Published | None) -> dict[str, dict[str, Any]]:
    """By benchmark: ours with its interval, the published number, and the difference; in the published scale."""
    known = published.rows.get(name, {}) if published else {}
    asked = published.figures() if published else {}
    found: dict[str, dict[str, Any]] = {}
    for name_of, of in scores["benchmarks"].items():
        for column, figure in asked.get(name_of, {name_of: ""}).items():
            figure = figure or f"avg@{of['k']}"
            scale = 1.0 if figure in UNSCALED else 100.0
            interval = of.get(f"{figure}/interval")
            cell = _cell(of.get(figure), known.get(column), scale)
            found[column] = cell | {"interval": interval and [scale * end for end in interval]}
    means = [cell["ours"] for column, cell in found.items() if "/" not in column]
    if len(means) > 1 and None not in means:
        found["mean"] = _cell(sum(means) / len(means), known.get("mean"), 1.0) | {"interval": None}
    return found


def _cell(ours: float | None, theirs: float | None, scale: float) -> dict[str, Any]:
    ours = None if ours is None else scale * ours
    difference = None if ours is None or theirs is None else ours - theirs
    return {"ours": ours, "published": theirs, "difference": difference}


def markdown(study: Study, rows: dict[str, dict[str, Any]], record: dict[str, Any]) -> str:
    columns = list(dict.fromkeys(column for row in rows.values() for column in row))
    lines = [f"# {study.title}", ""]
    lines += [study.note, ""] if study.note else []
    config = study.eval_config("base")
    lines += [
        f"avg@{config.k}, temperature {config.rollout.temperature:g}, top_p {config.rollout.top_p:g}, at most "
        f"{config.rollout.max_tokens} tokens" + (f", the first {config.problems} problems" if config.problems else ""),
        "",
    ]
    source = study.published
    lines += (
        [f"Each cell: ours (95% interval over problems); published; difference. Published: {source.source}", ""]
        if source
        else []
    )
    lines += [_line(["", *columns]), _line(["---"] * (len(columns) + 1))]
    lines += [_line([name, *(_text(row.get(column)) for column in columns)]) for name, row in rows.items()]
    lines += ["", f"Commit {record['commit'] or 'unknown'}."]
    for name, of in record["training"].items():
        taken = f", {of['gpu_hours']:.1f} GPU hours" if of["gpu_hours"] else ""
        on = f" on {of['starts'][-1]['ranks']} ranks, {of['starts'][-1]['device']}" if of["starts"] else ""
        lines.append(f"{name}: {of['steps']} steps, {of['hours']:.2f} hours{taken}{on}.")
    for name, of in record["evaluations"].items():
        versions = ", ".join(f"{package} {version}" for package, version in of["versions"].items() if version)
        lines.append(f"{name}: evaluated {of['ended']}; {versions}; {of['machine']['gpu'] or 'no GPU'}.")
    return "\n".join(lines) + "\n"


def _scores(study: Study, name: str) -> dict[str, Any] | None:
    file = study.folder("evaluations", name, SCORES)
    return json.loads(file.read_text()) if file.is_file() else None


def _training(study: Study, name: str) -> dict[str, Any]:
    records = RunFolder(study.folder("methods", name)).read(METRICS)
    hours = sum(row["perf/step_seconds"] for row in records) / 3600
    starts = _starts(study, name)
    found = {"steps": len(records), "hours": hours, "starts": starts, "last": records[-1] if records else None}
    gpus = starts[-1]["gpus"] if starts else None  # of a run that went on with another number: about
    return found | {"gpu_hours": None if gpus is None else hours * gpus}


def _starts(study: Study, name: str) -> list[dict[str, Any]]:
    file = study.folder("methods", name, STARTS)
    return json.loads(file.read_text())["starts"] if file.is_file() else []


def _text(cell: dict[str, Any] | None) -> str:
    if cell is None:
        return ""
    interval = f" ({cell['interval'][0]:.1f} to {cell['interval'][1]:.1f})" if cell["interval"] else ""
    published = "" if cell["published"] is None else f"; {cell['published']:.2f}"
    difference = "" if cell["difference"] is None else f"; {cell['difference']:+.2f}"
    return ("not known" if cell["ours"] is None else f"{cell['ours']:.2f}{interval}") + published + difference


def _line(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
