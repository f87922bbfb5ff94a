"""A hook of mkdocs: a link from a page to a file outside docs/ becomes that file's name, as the site has only docs/."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

LINK = re.compile(r"(?<!!)\[([^\]]+)\]\(([^)\s]+)\)")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Called by mkdocs with each page's text."""
    docs = Path(config["docs_dir"]).resolve()
    here = (docs / page.file.src_uri).parent

    def named(match: re.Match[str]) -> str:
        text, link = match[1], match[2]
        if re.match(r"\w+:|#", link):
            return match[0]
        target = (here / link.partition("#")[0]).resolve()
        if target.is_relative_to(docs) and not target.is_dir():
            return match[0]
        name = target.relative_to(docs.parent).as_posix()
        return f"`{name}`" if text.strip("`/") in (name, target.name, target.stem) else f"{text} (`{name}`)"

    return LINK.sub(named, markdown)
