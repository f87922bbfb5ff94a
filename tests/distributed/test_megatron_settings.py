"""What the settings that are passed on to Megatron do: their effect is seen, and what is computed stays the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from on_megatron import Seen, watched
from rank_pool import RankPool
from test_layouts import COMMON, MODELS, STEPS, TOLERANCE, differences
from tiny_models import make

from flowrl_mega.model.checks import PASSED_ON

pytestmark = pytest.mark.ranks
if torch.cuda.is_available() and torch.cuda.device_count() < 2:
    pytest.skip("two ranks need two GPUs, or none", allow_module_level=True)

FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
BLOCK = FULL | {"recompute_method": "block", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
# name: (section megatron, section parallel)
CASES: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "tp": ({}, {"tp": 2}),
    "full": (FULL, {"tp": 2}),
    "block": (BLOCK, {"tp": 2}),
    "attention": (SELECTIVE, {"tp": 2}),
    "mlp": (SELECTIVE | {"recompute_modules": ["mlp"]}, {"tp": 2}),
    "shards": (FULL | {"distribute_saved_activations": True}, {"tp": 2}),
    "pp": ({}, {"pp": 2}),
    "short first": ({"num_layers_in_first_pipeline_stage": 1}, {"pp": 2}),
    "short last": ({"num_layers_in_last_pipeline_stage": 1}, {"pp": 2}),
    "let go": ({"deallocate_pipeline_outputs": True}, {"pp": 2}),
}


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory, ranks2: RankPool) -> dict[str, list[Seen]]:
    """By case, then by rank: one step, of two updates."""
    path: Path = make("llama", tmp_path_factory.mktemp("llama"), **MODELS)
    batch = {"batch": {"mini_batch": 6, "tokens_per_microbatch": 40}}
    sections = {name: COMMON | batch | {"megatron": m, "parallel": p} for name, (m, p) in CASES.items()}
    return {name: ranks2.run(watched, path, STEPS[:1], case) for name, case in sections.items()}


def test_no_setting_is_left_out():
    assert {name for settings, _ in CASES.values() for name in settings} == set(PASSED_ON)


@pytest.mark.parametrize("case", ["full", "block", "attention", "mlp", "shards"])
def test_recomputation_changes_no_bit(seen: dict[str, list[Seen]], case: str) -> None:
    ours, plain = seen[case][0].trained, seen["tp"][0].trained
    assert ours.metrics == plain.metrics
    assert all(torch.equal(g, plain.gradients[name]) for name, g in ours.gradients.items())


def test_what_is_recomputed(seen: dict[str, list[Seen]]) -> None:
    """Calls of a layer's parts more than without, over those that an update makes."""

    def again(case: str, part: str) -> float:
        return seen[case][0].calls[part] - seen["tp"][0].calls[part]

    whole = again("full", "attention")
    assert whole > 0 and again("full", "mlp") == whole
    assert again("block", "attention") == again("block", "mlp") == whole / MODELS["num_hidden_layers"]
    assert (again("attention", "attention"), again("attention", "mlp")) == (whole, 0)
    assert (again("mlp", "attention"), again("mlp", "mlp")) == (0, whole)


def test_saved_inputs_lie_in_shards(seen: dict[str, list[Seen]]) -> None:
    assert (seen["full"][0].calls["gathered"], seen["tp"][0].calls["gathered"]) == (0, 0)
    assert seen["shards"][0].calls["gathered"] > 0


@pytest.mark.parametrize(("case", "layers"), [("pp", (2, 2)), ("short first", (1, 3)), ("short last", (3, 1))])
def test_stages_of_unequal_length(seen: dict[str, list[Seen]], case: str, layers: tuple[int, int]) -> None:
    first, last = (rank.calls["attention"] for rank in seen[case])
    assert first * layers[1] == last * layers[0] > 0
    worst = differences(seen[case][0].trained, seen["pp"][0].trained)
    assert max(worst.values()) < TOLERANCE, worst


def test_outputs_are_let_go_once_they_are_sent(seen: dict[str, list[Seen]]) -> None:
    """By the first stage; the last one's are its log-probs."""
    assert seen["let go"][0].calls["let go"] > 0 == seen["pp"][0].calls["let go"]
    ours, plain = seen["let go"][0].trained, seen["pp"][0].trained
    assert ours.metrics == plain.metrics
    assert all(torch.equal(g, plain.gradients[name]) for name, g in ours.gradients.items())
