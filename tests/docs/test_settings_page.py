"""docs/settings.md is what the fields say, and every field says what it is."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flowrl_mega.config import Config
from flowrl_mega.config_eval import EvalConfig
from flowrl_mega.objectives import REGISTRY

REPO = Path(__file__).parents[2]
sys.path.insert(0, str(REPO / "tools"))

import settings_page as tool  # noqa: E402


def test_the_page_is_up_to_date() -> None:
    stale = "docs/settings.md is not what the fields say; run: python tools/settings_page.py"
    assert (REPO / "docs" / "settings.md").read_text() == tool.page(), stale


@pytest.mark.parametrize("tree", [Config, EvalConfig, *REGISTRY.values()], ids=lambda tree: tree.__name__)
def test_every_field_is_on_it_and_described(tree: type) -> None:
    text = (REPO / "docs" / "settings.md").read_text()
    for name, of in tool.sections(tree):
        for field, info in of.model_fields.items():
            if tool.section(info) is None and not (tree in REGISTRY.values() and field == "name"):
                assert info.description, f"{name}.{field}"
                prefix = "objective." if tree in REGISTRY.values() else "" if name == "top level" else f"{name}."
                assert f"| `{prefix}{field}` |" in text


def test_a_row_says_type_bounds_and_default() -> None:
    text = tool.table("rollout", Config.model_fields["rollout"].annotation)
    assert "| `rollout.prompts_per_step` | int >= 1 | `16` |" in text
    assert "| `rollout.top_p` | float > 0, <= 1 | 1 |" in text
    assert "| `monitor.wandb` | `off`, `offline`, `online` | `off` |" in tool.table(
        "monitor", Config.model_fields["monitor"].annotation
    )
