"""`make docs`: the site builds with no broken link, and its pages ask nothing of another host."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mkdocs", reason="the extra docs is not installed")
pytestmark = pytest.mark.integration

REPO = Path(__file__).parents[2]


def test_the_site(tmp_path: Path) -> None:
    """mkdocs.yml is strict: a link to a page or heading that is not there ends the build."""
    command = [sys.executable, "-m", "mkdocs", "build", "--quiet", "--site-dir", str(tmp_path)]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    pages = sorted(tmp_path.rglob("index.html"))
    written = [page for page in (REPO / "docs").rglob("*.md") if page.name != "README.md"]
    assert len(pages) >= len(written)
    for page in pages:
        loads = re.findall(r"<(?:script|link|img|iframe)[^>]*(?:src|href)=[\"']?(https?://[^\"'> ]+)", page.read_text())
        assert not loads, f"{page}: {loads}"
    staleness = (tmp_path / "results" / "staleness" / "index.html").read_text()
    assert "tools/benchmarks/results/staleness.json</code>" in staleness, "a file outside docs/ is named, not linked"
