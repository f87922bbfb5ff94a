"""What the tools that make a page of docs/ have in common: write it, or check that it is up to date."""

from __future__ import annotations

import argparse
import sys
from pathlib import Path


def parser(doc: str) -> argparse.ArgumentParser:
    """doc: of the tool, whose first line says what it does."""
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where the page is out of date")
    return parser


def write_or_check(page: Path, text: str, check: bool, stale: str) -> int:
    """The exit code. stale: what is said of a page that is another text."""
    if not check:
        page.write_text(text)
    elif not page.is_file() or page.read_text() != text:
        print(stale, file=sys.stderr)
        return 1
    return 0
