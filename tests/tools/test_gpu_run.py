"""tools/gpu_run.py's own settings."""

from __future__ import annotations

from pathlib import Path

import pytest

pytestmark = pytest.mark.tools

TOOLS = Path(__file__).resolve().parents[2] / "tools"


@pytest.mark.parametrize(
    ("settings", "added"),
    [
        (["model.spec=te"], []),
        (["model.fp8=off"], []),
        (["model.dtype=bf16", "model.fp8=delayed"], ["model.fp8_budget=0.5"]),
    ],
)
def test_random_weights_have_a_budget_of_their_own(settings: list[str], added: list[str], monkeypatch) -> None:
    """Where there is FP8: else the setting would be refused. One that is given counts, as the last."""
    monkeypatch.syspath_prepend(str(TOOLS))
    import gpu_run

    given = [*settings, "model.fp8_budget=0.2"]
    assert gpu_run.with_budget(settings) == [*added, *settings]
    assert gpu_run.with_budget(given)[-1] == "model.fp8_budget=0.2"
