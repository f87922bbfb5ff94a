"""The optimizer against torch.optim.AdamW, and updates that must not happen."""

from __future__ import annotations

import copy
import math
from typing import Any

import on_ranks
import pytest
import torch
from torch import Tensor

from flowrl_mega.config import OptimizerSettings
from flowrl_mega.metrics import Max
from flowrl_mega.parallel.optimizer import Optimizer, wrap

STEPS, TOTAL = 6, 8  # updates made, and those after which a decay has ended


def make(path, settings: dict[str, Any], **sections: Any) -> tuple[Any, Any, Optimizer]:
    policy = on_ranks.build(path, log_z="mlp", **sections)
    model = wrap(policy.stages)
    return policy, model, Optimizer(model, OptimizerSettings(**settings), bf16=False, total_updates=TOTAL)


def gradients(policy: Any, step: int) -> dict[str, Tensor]:
    """Recorded gradients, of norms 2.5, 1.25, 0.83, ...: clipping acts in some steps and not in others."""
    return recorded({name: p.shape for name, p in policy.named_parameters()}, step)


def recorded(shapes: dict[str, torch.Size], step: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(step)
    scale = 2.5 / (1 + step) / sum(shape.numel() for shape in shapes.values()) ** 0.5
    return {name: scale * torch.randn(shape, generator=g) for name, shape in shapes.items()}


def fill(policy: Any, values: dict[str, Tensor]) -> None:
    for name, parameter in policy.named_parameters():
        parameter.main_grad.copy_(values[name])


def trajectory(path, settings: dict[str, Any]) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    policy, _, optimizer = make(path, settings)
    reports, weights = [], [snapshot(policy)]
    for step in range(STEPS):
        optimizer.zero_grad()
        fill(policy, gradients(policy, step))
        reports.append(optimizer.step(loss_is_finite=True))
        weights.append(snapshot(policy))
    return reports, weights


def snapshot(policy: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def rate(settings: OptimizerSettings, step: int) -> float:
    """Of the highest one."""
    made, warmup = step + 1, settings.warmup_steps
    if made <= warmup:
        return made / warmup
    progress = (made - warmup) / (TOTAL - warmup)
    return {"constant": 1.0, "linear": 1 - progress, "cosine": (1 + math.cos(math.pi * progress)) / 2}[settings.decay]


def expected(start: dict[str, Tensor], settings: OptimizerSettings) -> tuple[list[float], list[dict[str, Tensor]]]:
    """torch's AdamW in float64 on the same gradients: (gradient norms, weights after every step).

    Biases and norm weights (everything one-dimensional) do not decay, as in Megatron.
    """
    p = {name: torch.nn.Parameter(value.double()) for name, value in start.items()}
    groups: dict[tuple[bool, bool], list[Any]] = {}
    for name, parameter in p.items():
        groups.setdefault((parameter.dim() > 1, "partition" in name), []).append(parameter)
    decay, lr_z = settings.weight_decay, settings.log_z_lr or settings.lr
    adam = torch.optim.AdamW(
        [
            {"params": ps, "weight_decay": decay if matrix else 0.0, "base": lr_z if partition else settings.lr}
            for (matrix, partition), ps in groups.items()
        ],
        betas=settings.betas,
        eps=settings.eps,
    )
    norms, weights = [], []
    for step in range(STEPS):
        for name, gradient in recorded({name: parameter.shape for name, parameter in p.items()}, step).items():
            p[name].grad = gradient.double()
        norms.append(float(torch.nn.utils.clip_grad_norm_(p.values(), settings.clip_grad or math.inf)))
        for group in adam.param_groups:
            group["lr"] = group["base"] * rate(settings, step)
        adam.step()
        weights.append({name: parameter.detach().clone() for name, parameter in p.items()})
    return norms, weights


@pytest.mark.ranks
@pytest.mark.parametrize(
    "settings",
    [
        {"lr": 1e-3, "warmup_steps": 4, "clip_grad": 1.0, "weight_decay": 0.1},
        {"lr": 1e-3, "warmup_steps": 0, "clip_grad": 0.0, "weight_decay": 0.0, "betas": (0.8, 0.95), "eps": 1e-6},
        {"lr": 1e-3, "warmup_steps": 3, "log_z_lr": 2e-2},
        {"lr": 1e-3, "warmup_steps": 2, "decay": "linear"},
        {"lr": 1e-3, "warmup_steps": 0, "decay": "cosine", "log_z_lr": 2e-2},
    ],
    ids=["clip+warm-up", "plain", "log_z_lr", "linear", "cosine+log_z_lr"],
)
def test_trajectory_equals_adamw(settings, tiny_model, ranks1):
    """Clipping, warm-up from lr / n, decay to 0, weight decay of matrices alone, and log_z_lr for the partition
    function alone."""
    ((reports, weights),) = ranks1.run(trajectory, tiny_model("qwen2"), settings)
    checked = OptimizerSettings(**settings)
    norms, wanted = expected(weights[0], checked)
    clipped = [norm > 1 for norm in norms]
    assert any(clipped) and not all(clipped), "the recorded gradients must try both"
    for step, (report, found, right) in enumerate(zip(reports, weights[1:], wanted, strict=True)):
        assert float(report["grad_norm"].values) == pytest.approx(norms[step], rel=1e-5), "before it is clipped"
        assert isinstance(report["max_grad_norm"], Max) and report["max_grad_norm"].values == report["grad_norm"].values
        assert report["skipped_updates"].values == 0
        assert float(report["lr"].values) == pytest.approx(1e-3 * rate(checked, step))
        for name, tensor in right.items():
            error = (found[name] - tensor).abs().max().item()
            assert error < 1e-6, f"{name} after step {step + 1}"
    moved = {name: (weights[-1][name] - w).abs().max().item() for name, w in weights[0].items()}
    assert all(distance > 0 for distance in moved.values())


BAD = {
    "nan loss": (False, 0.0, None),
    "nan gradient": (True, math.nan, 0),
    "inf gradient": (True, math.inf, 0),
    "gradient of rank 1": (True, math.nan, 1),
}


def refused_update(path, loss_is_finite: bool, bad: float, bad_rank: int | None, **sections: Any) -> dict[str, Any]:
    """A good update, a bad one, a good one; and the same two good ones without the bad one between them."""
    runs = []
    for with_bad in (True, False):
        policy, _, optimizer = make(path, {"lr": 1e-2, "warmup_steps": 5}, **sections)
        found: dict[str, Any] = {}
        for step in (0, None, 1) if with_bad else (0, 1):
            optimizer.zero_grad()
            values = gradients(policy, step or 0)
            if step is None and bad_rank in (policy.layout.rank, 0):
                values["gpt.decoder.layers.0.mlp.linear_fc1.weight"][3, 3] += bad  # of this rank's shard
            fill(policy, values)
            before = state(policy, optimizer)
            report = optimizer.step(loss_is_finite or step is not None)
            if step is None:
                found = {"report": report, "unchanged": same(before, state(policy, optimizer))}
        runs.append((state(policy, optimizer), found, optimizer.updates, optimizer.skipped))
    (after, found, updates, skipped), (after_good, _, _, _) = runs
    return {**found, "like_never": same(after, after_good), "updates": updates, "skipped": skipped}


def state(policy: Any, optimizer: Optimizer) -> tuple[dict[str, Tensor], list[Any], int]:
    adam = optimizer.inner.optimizer.state_dict()["state"]
    moments = [value.clone() for key in sorted(adam) for _, value in sorted(adam[key].items())]
    return snapshot(policy), copy.deepcopy(moments), optimizer.schedule.num_steps


def same(a: tuple[Any, ...], b: tuple[Any, ...]) -> bool:
    return (
        all(torch.equal(x, y) for x, y in zip(a[0].values(), b[0].values(), strict=True))
        and len(a[1]) == len(b[1]) > 0
        and all(torch.equal(x, y) for x, y in zip(a[1], b[1], strict=True))
        and a[2] == b[2]
    )


@pytest.mark.ranks
@pytest.mark.parametrize("bad", BAD)
def test_non_finite_updates_leave_no_trace(bad, tiny_model, ranks2):
    """Neither in the weights nor in Adam's moments nor in the warm-up, on any rank, whichever rank saw it: one NaN in
    a moment would spoil every later step."""
    loss_is_finite, value, rank = BAD[bad]
    for found in ranks2.run(refused_update, tiny_model("llama"), loss_is_finite, value, rank, parallel={"tp": 2}):
        assert found["unchanged"]
        assert found["like_never"]
        assert (found["updates"], found["skipped"]) == (2, 1)
        assert found["report"]["skipped_updates"].values == 1
        if loss_is_finite:
            assert found["report"]["max_grad_norm"].values == math.inf, "of a NaN, too"
