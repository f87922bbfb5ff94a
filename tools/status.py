"""Writes docs/status.md, what of the project has run where, from docs/status.yaml.

    python tools/status.py [--check]

--check writes nothing and fails where the page is not what the data say.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import made_page
import yaml

REPO = Path(__file__).resolve().parent.parent
DATA, PAGE = REPO / "docs" / "status.yaml", REPO / "docs" / "status.md"
COLUMNS = {
    "cpu": "tested on CPU",
    "emulated": "emulated",
    "compiled": "compiled",
    "gpu": "run on GPU",
    "scale": "run at scale",
}
INTRODUCTION = """# What has run where

*Tested on CPU*: the real code on gloo ranks, beside an oracle. *Emulated*: what only a GPU has is done on the CPU, the
threads of csrc's kernels one after the other ([cuda_emulation](../tests/ops/cuda_emulation)), Transformer Engine's
native part in plain torch ([transformer_engine_emulation](../tests/transformer_engine_emulation)); the code above it is
the real one. *Compiled*: with nvcc, not run. *Run at scale*: on more than one node of GPUs. – means: not yet.
"""


def main() -> int:
    options = parser().parse_args()
    stale = "docs/status.md is not what docs/status.yaml says; run: python tools/status.py"
    return made_page.write_or_check(PAGE, page(yaml.safe_load(DATA.read_text())), options.check, stale)


def parser() -> argparse.ArgumentParser:
    return made_page.parser(__doc__)


def page(data: dict[str, Any]) -> str:
    """Raises ValueError for an unknown column, and for evidence that is not there."""
    rows = [["component", *COLUMNS.values()], ["---"] * (1 + len(COLUMNS))]
    for component in data["components"]:
        if strange := component.keys() - {"name", *COLUMNS}:
            raise ValueError(f"docs/status.yaml: {component['name']}: unknown column {sorted(strange)[0]}")
        rows.append([component["name"], *(cell(component.get(column), column) for column in COLUMNS)])
    as_of = data["as_of"]
    end = f"As of {as_of['date']}, commit {as_of['commit']}. Made by `python tools/status.py` from status.yaml.\n"
    return "\n".join([INTRODUCTION, *(f"| {' | '.join(row)} |" for row in rows), "", end])


def cell(evidence: Any, column: str) -> str:
    if evidence is None:
        return "–"
    if column == "compiled":
        return f"`{evidence}`"
    for path in evidence:
        if not (REPO / path).exists():
            raise ValueError(f"docs/status.yaml: {path} is not there")
    return ", ".join(f"[{Path(path).stem.removeprefix('test_')}](../{path})" for path in evidence)


if __name__ == "__main__":
    sys.exit(main())
