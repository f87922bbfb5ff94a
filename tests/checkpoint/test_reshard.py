"""A checkpoint loads in another layout (tensor, pipeline, data), whole, and training goes on as it would have."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from rank_pool import RankPool
from resharding import State, load, save
from tiny_models import make, random_sequences

SETTINGS: dict[str, Any] = {
    "objective": {"name": "flowrl", "beta": 2.0},
    "optimizer": {"lr": 1e-3, "log_z_lr": 1e-2, "warmup_steps": 10},
    "batch": {"tokens_per_microbatch": 40},
}
LAYOUTS = {"tp1": {"tp": 1, "dp": 1}, "tp2": {"tp": 2}, "dp2": {"tp": 1, "dp": 2}, "pp2": {"pp": 2}}

pytestmark = pytest.mark.ranks


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("model"), vocab=31)


@pytest.fixture(scope="module")
def recorded() -> tuple[list[Any], list[float]]:
    sequences = random_sequences([(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (2, 12)], vocab=31)
    return sequences, [1.0, 0.0, 0.5, -1.0, 0.0, 2.0]


def differences(found: State, wanted: State) -> dict[str, float]:
    """The largest difference by kind of tensor, in units of that tensor's largest element."""
    assert found.tensors.keys() == wanted.tensors.keys()
    worst: dict[str, float] = {}
    for name, tensor in wanted.tensors.items():
        error = (found.tensors[name] - tensor).abs().max().item() / tensor.abs().max().clamp(min=1e-12).item()
        kind = name.partition("/")[0]
        worst[kind] = max(worst.get(kind, 0.0), error)
    return worst


@pytest.mark.parametrize(
    ("before", "after"),
    [("tp2", "tp1"), ("tp1", "tp2"), ("tp2", "tp2"), ("dp2", "tp2"), ("tp2", "dp2"), ("tp2", "pp2"), ("pp2", "tp1")],
)
def test_the_next_update_at_another_layout(
    before: str, after: str, model: Path, recorded: Any, ranks1: RankPool, ranks2: RankPool, tmp_path: Path
) -> None:
    pools = {"tp1": ranks1, "tp2": ranks2, "dp2": ranks2, "pp2": ranks2}
    saved = pools[before].run(save, model, tmp_path, *recorded, parallel=LAYOUTS[before], **SETTINGS)[0]
    checkpoint = tmp_path / "checkpoints" / "step_3"
    reference = pools[before].run(load, model, checkpoint, *recorded, parallel=LAYOUTS[before], **SETTINGS)[0]
    moved = pools[after].run(load, model, checkpoint, *recorded, parallel=LAYOUTS[after], **SETTINGS)[0]

    loaded = moved[0]
    assert {"weight", "exp_avg", "exp_avg_sq"} == differences(loaded, saved).keys()
    assert max(differences(loaded, saved).values()) == 0, "what was saved is what is loaded, to the bit"
    assert loaded.updates == 3 and moved[1].updates == 4
    assert moved[1].lr == reference[1].lr == pytest.approx(4e-4), "the warm-up goes on"
    assert max(differences(moved[1], saved).values()) > 1e-3, "the update changes something"
    worst = differences(moved[1], reference[1])
    assert worst["weight"] < 1e-5 and worst["exp_avg"] < 1e-5 and worst["exp_avg_sq"] < 1e-5, worst
    assert moved[1].loss == pytest.approx(reference[1].loss, rel=1e-5)
    assert moved[1].log_z == pytest.approx(reference[1].log_z, rel=1e-5, abs=1e-5)


def test_lost_moments_would_be_seen(model: Path, recorded: Any, ranks2: RankPool, tmp_path: Path) -> None:
    """The tolerance above is tight enough to see that Adam's moments are used."""
    ranks2.run(save, model, tmp_path, *recorded, parallel=LAYOUTS["tp2"], **SETTINGS)
    checkpoint = tmp_path / "checkpoints" / "step_3"
    kept, lost = (
        ranks2.run(load, model, checkpoint, *recorded, forget, parallel=LAYOUTS["tp2"], **SETTINGS)[0][1]
        for forget in (False, True)
    )
    assert differences(lost, kept)["weight"] > 1e-4
