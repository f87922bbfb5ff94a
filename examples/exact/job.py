"""One run of the real trainer on the enumerable space, and the policy read off outcome by outcome."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowrl_mega.parallel  # noqa: F401  # before megatron
from examples.exact.space import END, MAX_TOKENS, PROMPTS, ids_of, outcomes
from flowrl_mega.config import Config
from flowrl_mega.evaluation.exact import sequence_logp
from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.packing import Sequence, pack
from flowrl_mega.preflight import Inputs
from flowrl_mega.run import Run
from flowrl_mega.settings import validated

# What all runs share: the same rates, and no weight decay, which would pull away from the target.
COMMON: dict[str, Any] = {
    "optimizer": {"lr": 1e-3, "log_z_lr": 5e-4, "weight_decay": 0.0},
    "reward": "examples.exact.space:reward",
    "checkpoint": {"at_end": False},
    "monitor": {"progress": False},
}


def rollout(answers: int, groups: int = 1) -> dict[str, int]:
    """Every prompt in every step, with so many answers in so many groups."""
    return {"prompts_per_step": len(PROMPTS) * groups, "group_size": answers, "max_tokens": MAX_TOKENS}


@dataclass(frozen=True)
class Trained:
    """One run's end: log pi [prompts, outcomes] and log Z [prompts], both float64, and the lines of metrics.jsonl.

    `log_z` is None where it is no function of the prompt alone. `watched`: log pi after this many steps.
    """

    logp: Tensor
    log_z: Tensor | None
    metrics: list[dict[str, float]]
    watched: dict[int, Tensor]

    def logged(self, name: str, last: int = 20) -> float | None:
        """The mean of a metric over the last steps; None where it is not logged."""
        values = [line[name] for line in self.metrics[-last:] if name in line]
        return sum(values) / len(values) if values else None


def train(task: Path, run_dir: Path, steps: int, sections: dict[str, Any], tp: int = 1, watch: int = 0) -> Trained:
    """Train on this rank (with the others) on what `space.write_task` wrote to `task`. `steps` = 0: the start.

    `sections`: settings over COMMON, `rollout` and `objective` among them. `watch`: steps between looks at the policy.
    """
    tree = {
        "run_dir": str(run_dir),
        "steps": max(1, steps),
        "model": {"path": str(task / "model")},
        "parallel": {"tp": tp},
        "data": {"path": str(task / "prompts.jsonl")},
        **COMMON,
        **sections,
    }
    config = validated(Config, tree, "")
    run = Run(Inputs(config), layouts.init(config.parallel, config.seed))
    policy = run.models.policy
    watched = {0: policy_logp(policy)} if watch else {}

    def look() -> bool:
        """The run asks after each step whether to stop: the moment at which its policy can be seen."""
        step = run.trainer.step_done
        if watch and step % watch == 0:
            watched[step] = policy_logp(policy)
        return False

    if steps:
        run.run(look)
    file = run_dir / "metrics.jsonl"
    lines = file.read_text().splitlines() if steps else []
    return Trained(policy_logp(policy), prompt_log_z(policy), [json.loads(line) for line in lines], watched)


def policy_logp(policy: Policy) -> Tensor:
    """log pi of every outcome of every prompt, [prompts, outcomes] float64."""
    pairs = [(ids_of(prompt), y) for prompt in PROMPTS for y in outcomes()]
    sequences = [Sequence(i, prompt, y) for i, (prompt, y) in enumerate(pairs)]
    return sequence_logp(policy, sequences, 1.0, 16384).view(len(PROMPTS), -1)


def prompt_log_z(policy: Policy) -> Tensor | None:
    """The partition function's log Z of every prompt, [prompts] float64; None where there is no such function."""
    batch = pack([Sequence(i, ids_of(prompt), [END]) for i, prompt in enumerate(PROMPTS)])
    log_z = policy.score([batch])[0].log_z
    return None if log_z is None else torch.empty(len(PROMPTS)).index_copy(0, batch.index, log_z).double()
