"""Transformer Engine over several ranks, each layout against one rank in the same precision: on GPUs where there are
enough, else emulated. The bound is one rank's own distance from fp32: a layout rounds elsewhere, and by no more.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import on_te
import pytest
from on_critic import Learnt, learn
from on_layouts import Trained, walk
from on_te import LOCAL32, SIZES, TE
from tiny_models import make, random_sequences

from flowrl_mega.experience import Experience
from flowrl_mega.rewards.load import Score
from flowrl_mega.rollout import Rollout

pytestmark = [pytest.mark.ranks, pytest.mark.integration]

LENGTHS = [(3, 5), (1, 1), (10, 20), (4, 9), (8, 7), (2, 30), (6, 3), (25, 15)]
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SP = {"sequence_parallel": True}
COMMON: dict[str, Any] = {
    "objective": {"name": "flowrl", "beta": 3.0, "tis": "mean", "reward_norm": "none"},
    "rollout": {"prompts_per_step": 4, "group_size": 2},
    "optimizer": {"lr": 1e-3, "warmup_steps": 0, "distributed": False},
    "batch": {"mini_batch": 4, "tokens_per_microbatch": 64},
}
PPO: dict[str, Any] = COMMON | {
    "objective": {"name": "ppo", "kl_coef": 0.3},
    "critic": {"optimizer": {"lr": 1e-3, "warmup_steps": 0}},
}
PRECISIONS: dict[str, dict[str, Any]] = {
    "fp32": LOCAL32,
    "bf16": TE,
    **{recipe: TE | {"fp8": recipe} for recipe in ("delayed", "tensorwise", "blockwise")},
}


def recorded() -> Experience:
    """A step's rollouts; the engine's log-probs are near those of a random model."""
    sequences, draw = random_sequences(LENGTHS), np.random.default_rng(0)
    rollouts = [
        Rollout(s.response, draw.normal(-4.6, 0.1, len(s.response)).tolist(), "stop", [(0, len(s.response))])
        for s in sequences
    ]
    return Experience(sequences, rollouts, [Score(reward, "", False) for reward in draw.random(len(sequences))])


STEP = recorded()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("qwen3", tmp_path_factory.mktemp("qwen3"), head_dim=64, **SIZES)


def sections(folder: Path, precision: str, **more: Any) -> dict[str, Any]:
    model = PRECISIONS[precision] | {"path": str(folder), "fp8_budget": 1e9}
    return COMMON | {"model": model} | more


@pytest.fixture(scope="module")
def alone(folder: Path, te_ranks1) -> Callable[[str], Trained]:
    """One rank's, in a precision."""
    found: dict[str, Trained] = {}

    def train(precision: str) -> Trained:
        if precision not in found:
            cases = [sections(folder, precision)]
            (found[precision],) = te_ranks1.run(walk, folder, [STEP], cases, timeout=240)[0]
        return found[precision]

    return train


class Distance:
    """Between two jobs: of log-probs, log Z and gradients, the latter as root mean square of the worst tensor."""

    def __init__(self, one: Trained, other: Trained) -> None:
        arrays = [{name: g.double().numpy() for name, g in trained.gradients.items()} for trained in (one, other)]
        self.gradients = on_te.relative(*arrays)
        pairs = [*zip(one.old_logp, other.old_logp, strict=True), *zip(one.ref_logp, other.ref_logp, strict=True)]
        self.logp = max(float((a - b).abs().max()) for a, b in pairs)
        self.log_z = float((one.log_z - other.log_z).abs().max())

    def beyond(self, factor: float, bound: Distance) -> set[str]:
        return {name for name, value in vars(self).items() if value > factor * vars(bound)[name] + 1e-3}

    def __repr__(self) -> str:
        return ", ".join(f"{name} {value:.2e}" for name, value in vars(self).items())


def check(precision: str, jobs: list[list[Trained]], alone: Callable[[str], Trained], sharded: bool = False) -> None:
    """`sharded`: each rank has the sums of its share of the gradients alone; their norm is looked at all the same."""
    exact = alone("fp32")
    bound = Distance(alone(precision), exact)
    for (found,) in jobs:
        distance = Distance(found, exact)
        print(distance, "| one rank:", bound)
        beyond = distance.beyond(2, bound) - ({"gradients"} if sharded else set())
        assert not beyond, f"{distance} and of one rank {bound}"
        norm, wanted = (trained.metrics[0]["policy/grad_norm"] for trained in (found, exact))
        assert abs(norm - wanted) < bound.gradients * wanted
        assert found.replica_difference == 0.0, "replicas that get unlike gradients drift apart"


@pytest.mark.parametrize("recompute", [{}, FULL], ids=["kept", "recomputed"])
@pytest.mark.parametrize("precision", ["bf16", "delayed", "tensorwise", "blockwise"])
def test_tensor_and_sequence_parallelism(precision, recompute, folder, alone, te_ranks2) -> None:
    case = sections(folder, precision, parallel={"tp": 2, **SP}, megatron=recompute)
    check(precision, te_ranks2.run(walk, folder, [STEP], [case], timeout=240), alone)


@pytest.mark.parametrize(
    ("precision", "parallel", "optimizer"),
    [
        ("bf16", {"cp": 2}, {}),
        ("tensorwise", {"cp": 2}, {}),
        ("bf16", {"pp": 2}, {}),
        ("tensorwise", {"pp": 2}, {}),
        ("blockwise", {"pp": 2}, {}),
        ("delayed", {"dp": 2}, {}),
        ("tensorwise", {"dp": 2}, {"distributed": True}),
    ],
    ids=lambda value: "-".join(f"{name}{n}" for name, n in value.items()) if isinstance(value, dict) else value,
)
def test_other_layouts(precision, parallel, optimizer, folder, alone, te_ranks2) -> None:
    """Context parallelism through Transformer Engine's ring of keys and values."""
    case = sections(folder, precision, parallel=parallel, optimizer=COMMON["optimizer"] | optimizer)
    check(precision, te_ranks2.run(walk, folder, [STEP], [case], timeout=240), alone, sharded=bool(optimizer))


@pytest.mark.parametrize("precision", ["bf16", "tensorwise", "blockwise"])
def test_context_and_tensor_parallelism(precision, folder, alone, te_ranks4) -> None:
    case = sections(folder, precision, parallel={"tp": 2, "cp": 2, **SP})
    check(precision, te_ranks4.run(walk, folder, [STEP], [case], timeout=240), alone)


@pytest.mark.parametrize("parallel", [{"tp": 2, **SP}, {"pp": 2}], ids=["tp2", "pp2"])
def test_ppo(parallel, folder, te_ranks1, te_ranks2) -> None:
    """The critic stays in bf16."""
    (one,) = te_ranks1.run(learn, folder, folder, [STEP], None, False, **ppo(folder), timeout=240)
    for other in te_ranks2.run(learn, folder, folder, [STEP], None, False, **ppo(folder, parallel), timeout=240):
        compare(one, other)


def ppo(folder: Path, parallel: dict[str, Any] | None = None) -> dict[str, Any]:
    return PPO | {"model": sections(folder, "tensorwise")["model"], "parallel": parallel or {}}


def compare(one: Learnt, other: Learnt) -> None:
    for name, bound in (("policy", 0.5), ("critic", 0.25)):
        arrays = [{key: g.double().numpy() for key, g in job.gradients[name].items()} for job in (one, other)]
        assert on_te.relative(*arrays) < bound
