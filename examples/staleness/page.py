"""docs/results/staleness.md: a table of each part and age, and the picture. Its words are written by hand."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from examples.markdown import line, put_between, rule
from examples.staleness.methods import PARTS, Part
from examples.staleness.results import Results
from examples.staleness.study import FIRST, TUNING_SEED
from flowrl_mega.monitor.plots import label, staleness_figure

PAGE, PICTURE = Path("docs/results/staleness.md"), Path("docs/images/staleness.png")
BEGIN, END = "<!-- tables: written by python -m examples.staleness.run -->", "<!-- end of the tables -->"
COLUMNS = ["method", "learning rate", "seeds", "pass rate", "distinct of 64", "held-out pass rate", "KL to start"]
FIGURES = {"pass_rate": 3, "distinct": 2, "held_out_pass_rate": 3, "kl": 2}
PICTURED = (
    "gflowrl",
    "gflowrl, no gap clip",
    "flowrl, z mlp, w paper",
    "rloo, matched KL, PPO clip",
    "grpo, no std, matched KL (k2)",
    "grpo",
)

Seeds = Mapping[str, Sequence[Mapping[str, Any]]]  # method -> its rows of the results, a seed each


def write(results: Results) -> None:
    """Puts the tables into the page, and the picture beside it."""
    tables, curves = [], dict[str, dict[int, list[Mapping[str, float]]]]()
    for key, part in PARTS.items():
        for ahead in part.ahead:
            runs = final(results, key, part, ahead)
            if not runs:
                continue
            tables.append(f"### {part.title}, {age(ahead)}\n\n{table(runs, part, ahead)}")
            if key == "age":
                for name in PICTURED:
                    rows = runs.get(part.run_of(name, ahead), [])
                    if rows:
                        curves.setdefault(label(name), {})[ahead] = [row["figures"] for row in rows]
    print("\n\n".join(tables))
    if len({ahead for of_method in curves.values() for ahead in of_method}) > 1:
        staleness_figure(curves, PICTURE)
    put_between(PAGE, BEGIN, END, "\n\n".join(tables))


def age(ahead: int) -> str:
    return f"{ahead} steps old" if ahead else "fresh"


def final(results: Results, key: str, part: Part, ahead: int) -> Seeds:
    """Each method's runs with the rate that was chosen, by seed, where it has had its first seeds."""
    found: dict[str, list[Mapping[str, Any]]] = {}
    for row in results.rows.values():
        if (row["part"], row["ahead"]) == (key, ahead) and row["seed"] != TUNING_SEED:
            found.setdefault(method_of(row), []).append(row)
    order = [name for name in part.methods(ahead) if len(found.get(name, [])) >= FIRST]
    return {name: sorted(found[name], key=lambda row: row["seed"]) for name in order}


def method_of(row: Mapping[str, Any]) -> str:
    return str(row["name"]).rpartition(" ahead ")[0]


def table(runs: Seeds, part: Part, ahead: int) -> str:
    """A method a line, best pass rate first; what was left out after the first seeds below the others."""
    lines = [line(COLUMNS), rule(len(COLUMNS))]
    for name, rows in sorted(runs.items(), key=lambda item: (-len(item[1]), -_mean(item[1], "pass_rate"))):
        rate = float(str(rows[0]["overrides"][0]).partition("=")[2])
        same = [label(other) for other in part.all_methods if other != name and part.run_of(other, ahead) == name]
        title = label(name) + (f" (the same: {'; '.join(same)})" if same else "")
        lines.append(line([title, f"{rate:g}", str(len(rows)), *(_cell(rows, f, d) for f, d in FIGURES.items())]))
    return "\n".join(lines)


def _mean(rows: Sequence[Mapping[str, Any]], figure: str) -> float:
    return statistics.mean(row["figures"][figure] for row in rows)


def _cell(rows: Sequence[Mapping[str, Any]], figure: str, digits: int) -> str:
    """Mean and sample standard deviation over the seeds; those that diverged have no other figures than 0."""
    values = [row["figures"][figure] for row in rows if figure in row["figures"]]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):.{digits}f}{spread}"
