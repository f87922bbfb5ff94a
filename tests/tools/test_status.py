"""docs/status.md is what docs/status.yaml says, and its evidence is there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.tools

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tools"))

import status  # noqa: E402


def test_the_page_is_up_to_date():
    done = subprocess.run(
        [sys.executable, str(REPO / "tools" / "status.py"), "--check"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_a_page_of_other_data_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr(status, "PAGE", tmp_path / "status.md")
    monkeypatch.setattr(sys, "argv", ["status.py", "--check"])
    assert status.main() == 1
    assert "run: python tools/status.py" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("component", "said"),
    [
        ({"name": "x", "cpu": ["tests/no_such_test.py"]}, "tests/no_such_test.py is not there"),
        ({"name": "x", "gup": ["tests"]}, "x: unknown column gup"),
    ],
)
def test_what_cannot_be_true_is_refused(component: dict, said: str):
    with pytest.raises(ValueError, match=said):
        status.page({"components": [component], "as_of": {"commit": "x", "date": "x"}})


def test_a_run_on_a_gpu_names_its_results():
    """A results file says on what machine, at what commit and when."""
    for component in yaml.safe_load(status.DATA.read_text())["components"]:
        for column in ("gpu", "scale"):
            assert all(path.startswith("tools/benchmarks/results/") for path in component.get(column) or ())
