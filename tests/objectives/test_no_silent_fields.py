"""No field of an objective is silent: each changes the loss, the credit or what the trainer is asked for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from flowrl_mega.config import ConfigError
from flowrl_mega.objectives import REGISTRY, LossInputs, build

KL = {"kl_coef": 0.1}
TIS = {
    "old": ({}, {"old": "behaviour"}),
    "tis": ({}, {"tis": "mean"}),
    "tis_cap": ({"tis": "mean"}, {"tis_cap": 1.001}),
}
CLIP = {"clip_eps": ({}, {"clip_eps": 1e-4}), "clip_eps_high": ({}, {"clip_eps_high": 1e-5})}
GRADIENT = {
    **TIS,
    **CLIP,
    "kl_coef": ({}, KL),
    "kl_estimator": (KL, {"kl_estimator": "k2"}),
}
FLOW = {
    **TIS,
    "beta": ({}, {"beta": 3.0}),
    "z_leave_one_out": ({"z": "group"}, {"z_leave_one_out": True}),
    "weight": ({}, {"weight": "none"}),
    "clip_gap": ({}, {"clip_gap": True}),
    "reference": ({}, {"reference": "old"}),
    "eps": ({}, {"eps": 1e-4}),
    "eps_high": ({"weight": "asym"}, {"eps_high": 1e-4}),
    "length_norm": ({}, {"length_norm": False}),
}
# objective -> field -> (what stands beside it, the change)
CHANGES: dict[str, dict[str, tuple[dict[str, Any], dict[str, Any]]]] = {
    "flowrl": {
        **FLOW,
        "z": ({}, {"z": "zero"}),
        "z_prompt": ({}, {"z_prompt": "drop-last"}),
        "z_dropout": ({}, {"z_dropout": 0.1}),
        "z_answers": ({"z": "frozen", "reward_norm": "none"}, {"z_answers": 5}),
        "reward_norm": ({}, {"reward_norm": "none"}),
    },
    "gflowrl": {
        **FLOW,
        "z_leave_one_out": ({"clip_gap": False}, {"z_leave_one_out": True}),
        "clip_gap": ({}, {"clip_gap": False}),
        "z_as_printed": ({"clip_gap": False}, {"z_as_printed": True}),
    },
    "grpo": {**GRADIENT, "std": ({}, {"std": False}), "loss_mean": ({}, {"loss_mean": "token"})},
    "gspo": {**TIS, **CLIP, "std": ({}, {"std": False})},
    "ppo": {
        **GRADIENT,
        "loss_mean": ({}, {"loss_mean": "sequence"}),
        "gamma": ({}, {"gamma": 0.9}),
        "lam": ({}, {"lam": 0.9}),
        "normalise": ({}, {"normalise": False}),
        "value_clip": ({}, {"value_clip": 0.001}),
        "kl_in": (KL | {"kl_estimator": "k2"}, {"kl_in": "loss"}),
        "kl_target": (KL, {"kl_target": 0.2}),
        "kl_horizon": (KL | {"kl_target": 0.2}, {"kl_horizon": 100}),
    },
    "cispo": {
        **GRADIENT,
        "std": ({}, {"std": False}),
        "loss_mean": ({}, {"loss_mean": "sum"}),
    },
    "rloo": {
        **GRADIENT,
        "loss_mean": ({}, {"loss_mean": "sum"}),
        "baseline": ({}, {"baseline": "group"}),
    },
    "reinforce_pp": {
        **GRADIENT,
        "loss_mean": ({}, {"loss_mean": "sequence"}),
        "baseline": ({}, {"baseline": "group"}),
    },
}
CASES = [(name, field) for name, fields in CHANGES.items() for field in fields]


def what_it_does(section: dict[str, Any], s: LossInputs) -> list[Any]:
    """With one micro-batch: credit, losses, and what it asks of the trainer."""
    objective, group = build(section), torch.tensor([0, 0, 1, 1, 1])
    if not (objective.log_z and objective.log_z.learned) and not objective.reference_answers:
        s = replace(s, log_z=None)
    credit = objective.credit(s.credit, group)
    noise = torch.linspace(-0.2, 0.2, s.logp.numel(), dtype=torch.float64)
    s = replace(s, credit=credit, group=group, rollout_logp=s.old_logp + noise, value=noise)
    (prepared,) = objective.prepare([replace(s, logp=s.old_logp)], lambda x: x, 2)
    s = replace(s, prepared=prepared)
    losses = [objective.loss(s)] + ([objective.value_loss(noise + 0.1, s)] if objective.needs_critic else [])
    sums = [(float(out.loss_sum), out.count) for out in losses]
    adapted = objective.adapted({"policy/kl_to_ref": 1.0}, 5)
    asked = [objective.needs_reference, objective.log_z, objective.reference_answers, objective.adapts]
    asked.append(objective.is_old_behaviour(stale=False))
    return [credit.tolist(), sums, asked, [getattr(adapted, name) for name in objective.adapts]]


def test_every_field_has_a_case() -> None:
    for name, kind in REGISTRY.items():
        assert CHANGES[name].keys() == kind.model_fields.keys() - {"name"}, name


@pytest.mark.parametrize(("name", "field"), CASES)
def test_a_field_changes_what_the_objective_does(name: str, field: str, packed: Any) -> None:
    beside, change = CHANGES[name][field]
    without = {"name": name, **beside}
    s = packed()
    assert what_it_does(without, s) != what_it_does({**without, **change}, s)


@pytest.mark.parametrize("name", REGISTRY)
def test_what_nothing_reads_is_refused(name: str) -> None:
    """Every row of the objective's table, with the value of the case above and without what it needs."""
    for rule in REGISTRY[name].NEEDS:
        for field in rule.fields.split():
            _, change = CHANGES[name][field]
            off = {"z": "zero"} if field in ("z_prompt", "z_dropout") else {}
            if field in ("eps", "eps_high") and "clip_gap" in CHANGES[name]:
                off = {"weight": "none", "clip_gap": False}
            with pytest.raises(ConfigError, match=rf"objective\.{field} = .*: is read with .* only"):
                build({"name": name, **off, **change})
