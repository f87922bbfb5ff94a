"""Writes docs/settings.md, every setting of train, eval and the objectives, from the descriptions of their fields.

    python tools/settings_page.py [--check]

--check writes nothing and fails where the page is not what the fields say.
"""

from __future__ import annotations

import argparse
import inspect
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import made_page
from annotated_types import BaseMetadata
from pydantic import BaseModel
from pydantic.fields import FieldInfo

REPO = Path(__file__).resolve().parent.parent
PAGE = REPO / "docs" / "settings.md"
BOUNDS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
INTRODUCTION = """# Settings

Every setting of `flowrl-mega train` and `serve`, of `flowrl-mega eval`, and of each objective. A YAML file has them as
a tree; `--section.field=value` on the command line overrides it. An unknown name is refused with the nearest one, and
so is a value that nothing would read. `--dry-run` shows what the settings come to.
"""


def main() -> int:
    options = parser().parse_args()
    stale = "docs/settings.md is not what the fields say; run: python tools/settings_page.py"
    return made_page.write_or_check(PAGE, page(), options.check, stale)


def parser() -> argparse.ArgumentParser:
    return made_page.parser(__doc__)


def page() -> str:
    sys.path.insert(0, str(REPO))
    from flowrl_mega.config import Config
    from flowrl_mega.config_eval import EvalConfig
    from flowrl_mega.objectives import REGISTRY

    trees: dict[str, type[BaseModel]] = {"Training": Config, "Evaluation": EvalConfig}
    parts = [INTRODUCTION]
    for title, tree in trees.items():
        parts += [f"## {title}\n"]
        parts += [f"### {title}: `{name}`\n\n{table(name, of)}" for name, of in sections(tree)]
    parts += ["## Objectives\n\nFields of `objective`, beside its `name`.\n"]
    parts += [f"### `{name}`\n\n{table('objective', of)}" for name, of in REGISTRY.items()]
    return "\n".join(parts)


def sections(tree: type[BaseModel], name: str = "") -> Iterator[tuple[str, type[BaseModel]]]:
    """Dotted names of the sections, those around them first."""
    yield name or "top level", tree
    for field, info in tree.model_fields.items():
        if inner := section(info):
            yield from sections(inner, f"{name}.{field}" if name else field)


def section(info: FieldInfo) -> type[BaseModel] | None:
    kinds = get_args(info.annotation) if is_union(info.annotation) else (info.annotation,)
    return next((kind for kind in kinds if inspect.isclass(kind) and issubclass(kind, BaseModel)), None)


def is_union(annotation: Any) -> bool:
    return get_origin(annotation) in (Union, UnionType)


def table(name: str, of: type[BaseModel]) -> str:
    rows = ["| setting | type | default | |", "| --- | --- | --- | --- |"]
    prefix = "" if name == "top level" else f"{name}."
    for field, info in of.model_fields.items():
        if name == "objective" and field == "name":  # it is the heading
            continue
        if section(info) is None or not info.is_required() and info.description:
            cells = [f"`{prefix}{field}`", kind(info), default(info), info.description or ""]
            rows.append(f"| {' | '.join(re.sub(r'(?<!`)[|]', chr(92) + '|', cell) for cell in cells)} |")
    return "\n".join(rows) + "\n"


def kind(info: FieldInfo) -> str:
    bounds = [
        f"{sign} {value:g}"
        for item in info.metadata
        if isinstance(item, BaseMetadata)
        for bound, sign in BOUNDS.items()
        if (value := getattr(item, bound, None)) is not None
    ]
    return " ".join([in_words(info.annotation), ", ".join(bounds)]).strip()


def in_words(annotation: Any) -> str:
    if annotation is type(None):
        return "null"
    if get_origin(annotation) is Annotated:
        return in_words(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if is_union(annotation):
        return " or ".join(map(in_words, get_args(annotation)))
    if inspect.isclass(annotation) and issubclass(annotation, BaseModel):
        return "section"
    if inner := get_args(annotation):
        shown = ", ".join(in_words(part) for part in inner if part is not Ellipsis)
        return f"{get_origin(annotation).__name__} of {shown}"
    return {"str": "text", "bool": "true, false", "Any": "any"}.get(annotation.__name__, annotation.__name__)


def default(info: FieldInfo) -> str:
    if info.is_required():
        return "required"
    value = info.get_default(call_default_factory=True)
    if isinstance(value, BaseModel):
        return ""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return f"{value:g}" if isinstance(value, float) else f"`{value}`" if value != "" else "empty"


if __name__ == "__main__":
    sys.exit(main())
