"""An update's micro-batches are launched without waiting for the GPU in between: nothing in them reads a value of a
tensor, and nothing copies a number to the device. Counted on a CPU, where nothing has to wait."""

from __future__ import annotations

from typing import Any

import pytest
from on_host_reads import waits_of_updates

pytestmark = pytest.mark.ranks

SECTIONS: dict[str, Any] = {
    "rollout": {"prompts_per_step": 4, "group_size": 4},
    "batch": {"mini_batch": 8, "tokens_per_microbatch": 40},
}
FLOWRL = {"name": "flowrl"}
PPO = {"objective": {"name": "ppo"}, "critic": {}}
CASES: dict[str, dict[str, Any]] = {
    "flowrl": {"objective": FLOWRL},
    "flowrl, log Z of the group": {"objective": {**FLOWRL, "z": "group"}},
    "flowrl, tis": {"objective": {**FLOWRL, "tis": "mean"}},
    "grpo": {"objective": {"name": "grpo"}},
    "gspo": {"objective": {"name": "gspo"}},
    "reinforce_pp": {"objective": {"name": "reinforce_pp"}},
    "ppo": PPO,
    "ppo, shared trunk": {**PPO, "critic": {"trunk": "shared"}},
    "recomputed": {
        "objective": FLOWRL,
        "megatron": {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1},
    },
}
LAYOUTS = {"tp2+sp": {"tp": 2, "sequence_parallel": True}, "pp2": {"pp": 2}, "cp2": {"cp": 2}, "dp2": {"dp": 2}}


@pytest.mark.parametrize("case", CASES)
def test_an_update_waits_for_nothing(case, tiny_model, ranks1):
    assert ranks1.run(waits_of_updates, tiny_model("llama", vocab=14), SECTIONS | CASES[case]) == [{}]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_and_so_in_every_layout(layout, tiny_model, ranks2):
    """But for stages of a pipeline: before each micro-batch, whose rows vary, Megatron sends the next stage its shape,
    and reads it there."""
    sections = SECTIONS | CASES["flowrl"] | {"parallel": LAYOUTS[layout]}
    for waits in ranks2.run(waits_of_updates, tiny_model("llama", vocab=14), sections):
        assert {place.split(" at ")[1] for place in waits} <= ({"p2p_communication.py"} if layout == "pp2" else set())
