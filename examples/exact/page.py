"""The tables of docs/results/exact.md. Its words are written by hand; what stands between the two marks is replaced."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from examples.exact import targets
from examples.exact.rows import ROWS, TABLES, TARGETS, target
from examples.markdown import line, put_between, rule

PAGE = Path("docs/results/exact.md")
BEGIN, END = "<!-- tables: written by make exact-table -->", "<!-- end of the tables -->"
# figure: title, decimals
COLUMNS = {
    "kl": ("KL(pi, pi*)", 4),
    "reward": ("E[r]", 3),
    "right": ("right", 3),
    "effective": ("effective right answers", 2),
    "length": ("length", 2),
    "kl_ref": ("KL(pi, pi_ref)", 3),
}
LOG_Z_COLUMNS = {
    "log_z": ("log Z", 3),
    "log_z_error": ("log Z - best", 4),
    "group_error": ("group's - best", 4),
}


def tables(results: Mapping[str, Sequence[Mapping[str, Any]]], ref_logp: Tensor) -> str:
    """Markdown: the targets, then a table of each group of rows that has results."""
    parts = [_targets(ref_logp)]
    for title, rows in TABLES.items():
        present = [key for key in rows if results.get(key)]
        if present:
            parts.append(
                f"### {title}\n\n" + _table({key: [run["figures"] for run in results[key]] for key in present})
            )
    return "\n\n".join(parts)


def _targets(ref_logp: Tensor) -> str:
    columns = {name: column for name, column in COLUMNS.items() if name != "kl"}
    lines = [line(["target", "pi*", *(title for title, _ in columns.values()), "log Z"]), rule(len(columns) + 3)]
    for name, meaning in TARGETS.items():
        log_p, log_z = target(name, ref_logp)
        found = targets.figures(log_p, ref_logp)
        cells = [f"{found[figure]:.{digits}f}" for figure, (_, digits) in columns.items()]
        lines.append(line([name, meaning, *cells, "" if log_z is None else f"{float(log_z.mean()):.3f}"]))
    return "\n".join(lines)


def _table(runs: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """A row a run; a KL to a target that is not the run's own end stands in brackets."""
    used = COLUMNS | {name: c for name, c in LOG_Z_COLUMNS.items() if any(name in r[0] for r in runs.values())}
    lines = [line(["", "target", *(title for title, _ in used.values())]), rule(len(used) + 2)]
    for key, figures in runs.items():
        row = ROWS[key]
        cells = [_cell(figures, name, digits) for name, (_, digits) in used.items()]
        if not row.own:
            cells[0] = f"({cells[0]})"
        lines.append(line([row.title, row.target, *cells]))
    return "\n".join(lines)


def _cell(figures: Sequence[Mapping[str, float]], name: str, digits: int) -> str:
    """The mean over the seeds, with the sample standard deviation where there are several."""
    values = [found[name] for found in figures if name in found]
    if not values:
        return ""
    spread = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.mean(values):z.{digits}f}{spread}"  # z: no minus before a 0


def write(text: str) -> None:
    """Put the tables into the page."""
    put_between(PAGE, BEGIN, END, text)
