"""Runs for the tests of the report, and a reading of the page by Python's own parser."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import yaml

from flowrl_mega import cli

VOID = {"meta", "input", "br", "link", "img"}
SETTINGS = {"steps": 60, "seed": 0, "objective": {"name": "flowrl", "beta": 2.0}, "rollout": {"max_staleness": 2}}


def write_lines(path: Path, records: Iterable[dict[str, Any]]) -> None:
    with open(path, "w") as file:
        file.writelines(json.dumps(record) + "\n" for record in records)


def metrics_of(steps: int, seed: int = 0, **changes: Any) -> list[dict[str, Any]]:
    """Of a run in which all is well. `changes`: name with __ for / -> a value, or a function of the step."""
    draw = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        row = {
            "step": step,
            "reward/mean": step / steps + draw.gauss(0, 0.01),
            "loss/policy": draw.gauss(1, 0.1),
            "policy/entropy": 3 - step / steps,
            "policy/grad_norm": draw.uniform(0.5, 1.5),
            "rollout/response_length": draw.gauss(400, 10),
            "rollout/stopped": draw.uniform(0.9, 1),
            "perf/step_seconds": draw.uniform(9, 11),
        }
        for name, value in changes.items():
            row[name.replace("__", "/")] = value(step) if callable(value) else value
        rows.append(row)
    return rows


def write_run(
    folder: Path, rows: list[dict[str, Any]] | None = None, settings: dict[str, Any] | None = None, seed: int = 0
) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    tree = {**(settings or SETTINGS), "seed": seed, "run_dir": str(folder)}
    (folder / "config.yaml").write_text(yaml.safe_dump(tree, sort_keys=False))
    write_lines(folder / "metrics.jsonl", metrics_of(60, seed) if rows is None else rows)
    return folder


def distribution(step: int, width: float = 1.0) -> dict[str, Any]:
    edges = [width * (at - 4) for at in range(9)]
    answers = [
        {"text": f"{k}+{47 - k}", "count": k, "reward": 1.0, "target": 0.5 / k, "empirical": 0.3 / k} for k in (1, 2)
    ]
    return {
        "step": step,
        "residual": {
            "edges": edges,
            "counts": [1, 2, 8, 16, 16, 8, 2, 1],
            "quantiles": {"0.05": -2.0, "0.25": -1.0, "0.5": 0.0, "0.75": 1.0, "0.95": 2.0},
        },
        "log_z": {"logged": [1.0, 2.0, 3.0], "group": [1.25, 2.25, 3.25], "exact": [1.0, None, 3.0]},
        "prompts": [{"prompt": "47:", "answers": answers}],
    }


class Element:
    def __init__(self, tag: str, attributes: dict[str, str | None], above: Element | None) -> None:
        self.tag, self.attributes, self.above = tag, attributes, above
        self.pieces: list[str] = []

    @property
    def text(self) -> str:
        return "".join(self.pieces)

    def is_in(self, tag: str, **attributes: str) -> bool:
        place = self.above
        while place and not (place.tag == tag and attributes.items() <= place.attributes.items()):
            place = place.above
        return place is not None


class Page(HTMLParser):
    """All elements of a page, in order. AssertionError where tags do not match."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.html, self.elements = html, list[Element]()
        self._open: list[Element] = []
        self.feed(html)
        self.close()
        assert not self._open, f"not closed: {self._open[-1].tag}"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_startendtag(tag, attrs)
        if tag not in VOID:
            self._open.append(self.elements[-1])

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert len(dict(attrs)) == len(attrs), f"an attribute twice: {attrs}"
        self.elements.append(Element(tag, dict(attrs), self._open[-1] if self._open else None))

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop().tag == tag, f"</{tag}> at {self.getpos()}"

    def handle_data(self, data: str) -> None:
        for element in self._open:
            element.pieces.append(data)

    def all(self, *tags: str, **attributes: str) -> list[Element]:
        return [e for e in self.elements if e.tag in tags and attributes.items() <= e.attributes.items()]

    def tags(self) -> Counter[str]:
        return Counter(element.tag for element in self.elements)

    def section(self, name: str) -> str:
        """The text of one section."""
        return self.all("section", id=name)[0].text

    def rows(self, label: str) -> list[list[str]]:
        """The cells of the tables in the box with this label."""
        cells: dict[Element, list[str]] = {}
        for element in self.all("td", "th"):
            if element.is_in("div", **{"aria-label": label}):
                cells.setdefault(element.above, []).append(element.text)
        return list(cells.values())

    def warnings(self) -> list[str]:
        return [element.text for element in self.all("li") if element.is_in("ul", **{"class": "warnings"})]

    def alt(self, title: str) -> str:
        """The text in the place of the picture with this title."""
        figures = {e.above: e.text for e in self.all("figcaption")}
        found = [e for e in self.all("svg") if figures.get(e.above, "").split(" (")[0] == title]
        return str(found[0].attributes["aria-label"])

    def titles(self) -> list[str]:
        return [element.text for element in self.all("figcaption")]


def report(*arguments: Path | str) -> Page:
    """The page that the command writes of these runs."""
    assert cli.main(["report", *map(str, arguments)]) == 0
    text = (Path(arguments[0]) / "report.html").read_text(encoding="utf-8")
    return Page(text)
