"""One step of FlowRL: prompts -> rollouts -> rewards -> scored micro-batches -> updates -> engine."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from operator import truediv
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

from flowrl_mega.config import Config
from flowrl_mega.experience import Experience, MicroBatch, micro_batches, packing_efficiency
from flowrl_mega.grading import Grader
from flowrl_mega.learner import Models
from flowrl_mega.metrics import FromMeans, Max, Mean, Report, Update
from flowrl_mega.model.policy import PolicyOutput
from flowrl_mega.monitor.step_metrics import cost_metrics, memory_of_ranks, merge_updates, utilisation
from flowrl_mega.objectives import Objective
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rollout import Engine
from flowrl_mega.rollout.group_queue import Group, GroupQueue
from flowrl_mega.rollout.mismatch import staleness
from flowrl_mega.so_far import so_far


class Trainer:
    """Trains one step at a time, on parts that `run.Run` builds. All methods are collective.

    `step_done` is the last step that is done (0: none); the engine has the weights after it.
    """

    def __init__(
        self,
        config: Config,
        layout: Layout,
        objective: Objective,
        models: Models,
        engine: Engine,
        queue: GroupQueue,
        grader: Grader,
    ) -> None:
        self.config, self.layout, self.objective, self.models = config, layout, objective, models
        self.engine, self.queue, self.grader = engine, queue, grader
        self.step_done = 0
        self.log_z: dict[int, float] | None = None  # where it is frozen, by the prompt's index in the data set
        self.seconds: dict[str, float] = defaultdict(float)
        self.memory_gb: list[float] = []  # of every rank, after the last step
        self.watched: list[tuple[torch.Tensor, dict[str, torch.Tensor]]] | None = None  # of a step's first update
        self.seen: tuple[list[Group], dict[str, np.ndarray]] | None = None  # the last step's, where they are watched

    def step(self) -> tuple[dict[str, float], list[dict[str, Any]]]:
        """Train on one batch of prompts; returns the step's metrics and some readable samples."""
        step = self.step_done + 1
        self.seconds.clear()
        groups, counts = self.rollouts(step)
        experience = Experience.of(groups, self.log_z)
        with self.timed("score"):
            mini_batches = self.micro_batches(experience)
        with self.timed("update"):
            self.watched = [] if self.config.monitor.distributions_every else None
            updates: list[Update] = [self.update(mini_batches[0])]
            watched, self.watched = self.watched, None
            updates += [self.update(mini_batch) for mini_batch in mini_batches[1:]]
            if watched is not None:
                self.seen = groups, columns_of(watched, len(experience.sequences), self.layout)
            if "loss/policy" in updates[0]:  # the policy has learnt, not the critic alone
                self.objective = self.objective.adapted(merge_updates(updates), len(experience.sequences))
            counts |= self.models.gate.after_step(step, mini_batches[0][0].packed, self.config.rollout.temperature)
        with self.timed("sync"), so_far("sending the weights to the engine", show=self.layout.rank == 0):
            counts |= self.engine.sync(self.models.policy, version=step)
        self.step_done = step
        counts |= staleness(experience.rollouts, step - 1) | self.engine.metrics()
        return counts | self.metrics(experience, updates), self.grader.samples(groups)

    def rollouts(self, step: int) -> tuple[list[Group], dict[str, float]]:
        """The step's groups, answered and scored; with `rollout.ahead` the first rounds of later steps are begun."""
        self.queue.begin_step(step)
        while not self.queue.has_enough:
            with self.timed("generate"):
                groups = self.queue.finish_round(step)
            with self.timed("reward"):
                self.grader.grade_groups(groups)
            self.queue.accept(groups)
        taken = self.queue.take()
        if self.config.rollout.ahead:
            with self.timed("generate"):
                self.queue.start_ahead(step, self.config.steps)
        self.engine.release()
        return taken

    def micro_batches(self, experience: Experience) -> list[list[MicroBatch]]:
        """This rank's micro-batches of every update in the next step, with all that the losses read."""
        return micro_batches(experience, self.models, self.objective, self.config, self.layout, step=self.step_done + 1)

    def update(self, mini_batch: list[MicroBatch]) -> dict[str, Mean | Max]:
        """One optimizer step on the mean loss over the mini-batch, and one of a critic with a trunk of its own."""
        metrics: dict[str, Mean | Max] = {}
        if self.models.critic_learner:
            metrics |= self.models.critic_learner.update(mini_batch, lambda stage, b: stage(b.packed), self.value_loss)
        if self.config.critic is None or self.step_done >= self.config.critic.warmup_steps:
            metrics |= self.models.learner.update(mini_batch, self.forward, self.loss)
            self.models.logits_budget.after_update(self.models.learner.optimizer.updates)
        return metrics

    def forward(self, stage: Any, batch: MicroBatch) -> PolicyOutput | torch.Tensor:
        """One pipeline stage's forward of a micro-batch: hidden states [T, 1, H], or the last stage's outputs."""
        return stage(batch.packed, self.config.rollout.temperature)

    def loss(self, output: PolicyOutput, batch: MicroBatch) -> tuple[torch.Tensor, int, Report]:
        """The objective on one micro-batch: a sum of losses, the count to divide it by, and what to report."""
        inputs = batch.loss_inputs(output)
        result = self.objective.loss(inputs)
        entropy = inputs.mean(output.entropy)
        if self.watched is not None:
            self.watched.append((batch.packed.index, {"entropy": entropy, **result.answers}))
        loss_sum, report = result.loss_sum, {**result.metrics, "policy/entropy": Mean(entropy)}
        if output.value is not None:
            assert self.config.critic is not None
            values = self.objective.value_loss(output.value, inputs)
            loss_sum = loss_sum + self.config.critic.value_coef * values.loss_sum
            report |= values.metrics
        return loss_sum, result.count, {**report, "loss/policy": mean_loss(loss_sum, result.count, batch)}

    def value_loss(self, value: torch.Tensor, batch: MicroBatch) -> tuple[torch.Tensor, int, Report]:
        """The critic's loss on one micro-batch, from its values [R]; as `loss`."""
        result = self.objective.value_loss(value, batch.loss_inputs())
        report = {**result.metrics, "loss/critic": mean_loss(result.loss_sum, result.count, batch)}
        return result.loss_sum, result.count, report

    def metrics(self, experience: Experience, updates: list[Update]) -> dict[str, float]:
        """The step's line of metrics.jsonl."""
        self.memory_gb = memory_of_ranks(self.layout)
        return {
            **experience.metrics(),
            **merge_updates(updates),
            "perf/packing_efficiency": packing_efficiency(experience, self.config, self.layout),
            **cost_metrics(self.seconds, experience.tokens, experience.generated_tokens, self.memory_gb),
            **self.utilisation(experience.tokens),
        }

    def utilisation(self, tokens: int) -> dict[str, float]:
        """Of the update phase, on GPUs."""
        if self.layout.device.type != "cuda":
            return {}
        name = torch.cuda.get_device_name(self.layout.device)
        return utilisation(self.parameters, tokens, self.seconds["update"], self.layout.world, name)

    @cached_property
    def parameters(self) -> int:
        """Of the whole policy, counted once. Collective."""
        mine = sum(p.numel() for stage in self.models.policy.stages for p in stage.parameters())
        total = torch.tensor(float(mine), device=self.layout.device, dtype=torch.float64)
        dist.all_reduce(total)
        return int(total) // (self.layout.dp * self.layout.cp)  # what all tp ranks have is counted tp times: little

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        """Adds the block's seconds to the phase; on a GPU all of its work, not only its launch."""
        start = time.perf_counter()
        yield
        if self.layout.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds[phase] += time.perf_counter() - start


def columns_of(
    watched: list[tuple[torch.Tensor, dict[str, torch.Tensor]]], answers: int, layout: Layout
) -> dict[str, np.ndarray]:
    """What the losses of an update said of each of the step's answers, by name [answers] float64: nan for those of
    other updates, nothing where the critic alone has learnt. Collective."""
    found: dict[str, np.ndarray] = {}
    if layout.is_last_stage and watched:
        names = list(watched[0][1])
        table = torch.zeros(len(names) + 1, answers, dtype=torch.float64, device=layout.device)
        for index, of in watched:
            values_of = [of[name].detach().double() for name in names]
            rows = torch.stack([*values_of, torch.ones_like(values_of[0])])
            table.index_add_(1, index.to(layout.device), rows)
        layout.dp_sum(table)  # each answer is on one replica
        values = table.cpu().numpy()
        found = dict(zip(names, np.where(values[-1] > 0, values[:-1], np.nan), strict=True))
    columns: dict[str, np.ndarray] = layout.from_last_stage(found)
    return columns


def mean_loss(loss_sum: torch.Tensor, count: int, batch: MicroBatch) -> FromMeans:
    """The loss as a metric: an update's sum of losses by its count, which is one of sequences or of tokens."""
    sequences = batch.packed.size
    counts = torch.full((), count, device=loss_sum.device)
    return FromMeans(truediv, Mean(loss_sum, sequences), Mean(counts, sequences))
