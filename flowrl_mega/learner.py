"""The models of a run: those that learn, each with its optimizer, and the frozen reference."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowrl_mega import ops
from flowrl_mega.checkpoint import load_model
from flowrl_mega.config import Config, OptimizerSettings
from flowrl_mega.metrics import Max, Mean
from flowrl_mega.model.architecture import Architecture, read_architecture
from flowrl_mega.model.critic import Critic
from flowrl_mega.model.fp8_gate import Fp8Gate
from flowrl_mega.model.logits_budget import LogitsBudget
from flowrl_mega.model.policy import Policy, build_reference
from flowrl_mega.model.stage import Model
from flowrl_mega.monitor.step_metrics import reduce_reports
from flowrl_mega.objectives import Objective
from flowrl_mega.parallel.layout import Layout, rank
from flowrl_mega.parallel.offload import Offload
from flowrl_mega.parallel.optimizer import Optimizer, decided, wrap
from flowrl_mega.parallel.schedule import B, Forward, LossFunction, forward_backward
from flowrl_mega.so_far import so_far


class Learner:
    """A model's gradient buffers (Megatron's DDP) and optimizer; one optimizer step per `update`.

    `total_updates`: after how many a decay of the learning rate ends. `rates`: learning rates by pattern of the
    parameter's name, where they are not `settings.lr`. `name` is the group of its metrics, and `update` expects
    the loss to be among what `loss` reports, as loss/`name`. `overlap`: `ParallelSettings.overlap_grad_reduce`. All
    methods are collective.
    """

    def __init__(
        self,
        model: Model,
        settings: OptimizerSettings,
        bf16: bool,
        total_updates: int,
        rates: dict[str, float] | None = None,
        name: str = "policy",
        overlap: bool = False,
    ) -> None:
        self.model, self.name = model, name
        self.stages = wrap(model.stages, settings.shares, overlap)
        self.optimizer = Optimizer(self.stages, settings, bf16, total_updates, rates)

    def update(self, mini_batch: list[B], forward: Forward[B], loss: LossFunction[B]) -> dict[str, Mean | Max]:
        """One optimizer step on the mean loss over the micro-batches; returns its metrics, on every rank."""
        layout = self.model.layout
        self.optimizer.zero_grad()
        reports = forward_backward(self.stages, mini_batch, forward, loss)
        # Losses are the last pipeline stage's, and all stages must take or refuse the update together.
        metrics = layout.from_last_stage(reports and reduce_reports(reports, layout.dp_group))
        ops.raise_if_flagged()  # the metrics have waited for the device already
        stepped = self.optimizer.step(loss_is_finite=math.isfinite(metrics[f"loss/{self.name}"].values))
        return metrics | {f"{self.name}/{name}": metric for name, metric in stepped.items()}


@dataclass
class Models:
    """The policy, and where the objective asks for them a critic with a trunk of its own and the reference."""

    policy: Policy
    learner: Learner
    critic: Critic | None
    critic_learner: Learner | None
    reference: Policy | None
    reference_offload: Offload | None  # the context in which the reference can be scored; None: always
    gate: Fp8Gate
    logits_budget: LogitsBudget

    @property
    def shares_trunk(self) -> bool:
        """Whether the critic is a second head on the policy's trunk."""
        return self.policy.with_value

    def stuck(self, most: int, is_last: bool) -> str | None:
        """Why the run can no longer learn, or None: one of its models has had `most` updates in a row refused, or in
        all of the run (`is_last`) not made one."""
        for name, (_, optimizer) in self.trained().items():
            if optimizer.in_a_row >= most or (is_last and optimizer.skipped and not optimizer.updates):
                return (
                    f"the last {optimizer.in_a_row} updates of the {name} were skipped, because loss or gradient was "
                    "not finite (on_nonfinite.most); see reward/mean and loss/* in metrics.jsonl; lower optimizer.lr, "
                    "scale the rewards, or correct what gives infinities"
                )
        return None

    def trained(self) -> dict[str, tuple[Model, Optimizer]]:
        """The models that learn with their optimizers, the policy first: what a checkpoint holds."""
        found: dict[str, tuple[Model, Optimizer]] = {"policy": (self.policy, self.learner.optimizer)}
        if self.critic and self.critic_learner:
            found["critic"] = (self.critic, self.critic_learner.optimizer)
        return found


def build_models(arch: Architecture, objective: Objective, config: Config, layout: Layout) -> Models:
    """The models that the settings and the objective ask for, with the weights of model.path. Collective."""
    critic, bf16 = config.critic, config.model.dtype == "bf16"
    total_updates = config.steps * config.updates_per_step
    shares_trunk = critic is not None and critic.trunk == "shared"
    policy = _loaded(Policy(arch, config, layout, objective.log_z, with_value=shares_trunk), config.model.path)
    # The head of a critic that shares the trunk has the critic's own learning rate.
    rates = {"*value_head.*": critic.optimizer.lr} if critic else None
    copies, overlap = layout.dp * layout.cp, config.parallel.overlap_grad_reduce
    settings = decided(config.optimizer, copies, config.model.fp8_params)
    learner = Learner(policy, settings, bf16, total_updates, rates, overlap=overlap)
    own_critic = critic_learner = reference = offload = None
    if critic and not shares_trunk:
        path = critic.path or config.model.path
        own_critic = _loaded(Critic(read_architecture(path), config, layout), path)
        settings = decided(critic.optimizer, copies)
        critic_learner = Learner(own_critic, settings, bf16, total_updates, name="critic", overlap=overlap)
    if objective.needs_reference:
        reference = _loaded(build_reference(arch, config, layout), config.model.path)
        offload = reference.offload() if config.model.reference_offload else None
    gate = Fp8Gate(policy, config.model, getattr(objective, "length_norm", True))
    budget = LogitsBudget(policy, config.model.logits_budget_mb)
    return Models(policy, learner, own_critic, critic_learner, reference, offload, gate, budget)


def _loaded(model: Any, path: str | Path) -> Any:
    with so_far(f"loading {path}", show=rank() == 0):
        load_model(model, path)
    return model
