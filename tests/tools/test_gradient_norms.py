"""tools/benchmarks/gradient_norms.py: drift multiplies the gradient by e^(drift |y|), as far as the weight lets it."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.tools
LENGTH = 100


@pytest.fixture
def norm(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "tools" / "benchmarks"))
    import gradient_norms

    return lambda drift, weight, z: gradient_norms.norm(LENGTH, drift, weight, z, seed=0)


@pytest.mark.parametrize("z", ["mlp", "random", "group"])
def test_drift_multiplies_what_no_weight_bounds(norm: Any, z: str) -> None:
    """With equal noise, w of every answer grows by the same factor, and the residual hardly moves."""
    ratio = norm(0.3, "released", z) / norm(0.1, "released", z)
    assert ratio == pytest.approx(math.exp(0.2 * LENGTH), rel=0.05)
    assert norm(0.3, "max10", z) / norm(0.1, "max10", z) == pytest.approx(1, rel=0.05), "10, whatever the drift"
    bounded = norm(0.3, "paper", z)
    assert norm(0.3, "max10", z) / bounded == pytest.approx(10 / 1.2, rel=1e-6)
    assert norm(-0.3, "paper", z) / bounded == pytest.approx(0.8 / 1.2, rel=0.05), "paper has a floor"
