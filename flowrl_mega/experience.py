"""What a step learns from: its answers, and the micro-batches made of them with all that the losses read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.learner import Models
from flowrl_mega.model.policy import PolicyOutput
from flowrl_mega.objectives import LossInputs, Objective
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.packing import PackedBatch, Sequence, efficiency, plan
from flowrl_mega.rewards.load import Score
from flowrl_mega.rewards.scorer import verdicts
from flowrl_mega.rollout import Rollout
from flowrl_mega.rollout.group_queue import Group


@dataclass(frozen=True)
class Experience:
    """The N answers of one step with their scores, prompt by prompt, equally many each."""

    sequences: list[Sequence]
    rollouts: list[Rollout]
    scores: list[Score]
    uniform_groups: float = 0.0  # share of prompts whose answers all have the same reward
    log_z: list[float] | None = None  # of each answer's prompt, where it is frozen

    @classmethod
    def of(cls, groups: list[Group], log_z: Mapping[int, float] | None = None) -> Experience:
        """`log_z`: where it is frozen, each prompt's, by its index in the data set."""
        rollouts = [rollout for group in groups for rollout in group.rollouts]
        scores = [score for group in groups for score in group.scores]
        uniform = sum(group.is_uniform for group in groups) / len(groups)
        frozen = None if log_z is None else [log_z[group.index] for group in groups for _ in group.rollouts]
        return cls(as_sequences([group.prompt for group in groups], rollouts), rollouts, scores, uniform, frozen)

    @property
    def has_rollout_logp(self) -> bool:
        """Whether the engine reported a log-prob for every token."""
        return all(len(rollout.logp) == len(rollout.response) for rollout in self.rollouts)

    @property
    def tokens(self) -> int:
        """Prompt and response tokens, each answer with its prompt."""
        return sum(sequence.rows + 1 for sequence in self.sequences)

    @property
    def generated_tokens(self) -> int:
        return sum(len(rollout.response) for rollout in self.rollouts)

    def metrics(self) -> dict[str, float]:
        rollouts, scores = self.rollouts, self.scores
        return {
            "reward/mean": sum(score.reward for score in scores) / len(scores),
            "reward/right": sum(score.right for score in scores) / len(scores),
            "reward/uniform_groups": self.uniform_groups,
            "reward/failed": sum(score.failed for score in scores),
            **verdicts(scores),
            "rollout/response_length": self.generated_tokens / len(rollouts),
            "rollout/stopped": sum(r.finish_reason == "stop" for r in rollouts) / len(rollouts),
        }


@dataclass(frozen=True)
class MicroBatch:
    """Packed rows of B answers with R response tokens, and what the losses read beside the policy's outputs.

    Scores are those before the step's first update, by response token in the packed order; under context parallelism
    every rank has those of the whole micro-batch. Log-probs are in nats, at the rollout's temperature. Only the last
    pipeline stage has `old_logp`, `ref_logp` and `value`: it alone computes losses.
    """

    packed: PackedBatch
    credit: Tensor  # [B] float64, what `Objective.credit` made of the rewards
    group: Tensor  # [B] int64, each answer's prompt by its number in the step
    groups: int = 0  # prompts in the step; 0 where the groups are not known
    log_z: Tensor | None = None  # [B] float64, where it is frozen
    rollout_logp: Tensor | None = None  # [R] log-probs that the engine reported; None where it reports none
    old_logp: Tensor | None = None  # [R] log pi_old(y_t); None where the first update's own forward gives it
    ref_logp: Tensor | None = None  # [R] log pi_ref(y_t); None where the objective needs no reference
    value: Tensor | None = None  # [R] the critic's V(x, y_<t); None without a critic
    prepared: Mapping[str, Tensor] = field(default_factory=dict)  # what `Objective.prepare` made of the whole step
    by_behaviour: bool = False  # ratios are against rollout_logp

    def loss_inputs(self, output: PolicyOutput | None = None) -> LossInputs:
        """The micro-batch as objectives read it: with the policy's outputs in an update, without before it."""
        if output:
            logp, trainer = output.logp, self.old_logp
            trainer = logp.detach() if trainer is None else trainer
        else:
            # What is not scored must not be read: NaN makes of such a mistake a refused update.
            unknown = torch.full((self.packed.response_offsets[-1],), math.nan, device=self.credit.device)
            logp = trainer = unknown if self.old_logp is None else self.old_logp
        old_logp = self.rollout_logp if self.by_behaviour else trainer
        assert old_logp is not None, "the engine's log-probs were asked for"
        return LossInputs(
            logp=logp,
            old_logp=old_logp,
            trainer_logp=trainer if self.by_behaviour else None,
            ref_logp=self.ref_logp,
            log_z=output.log_z if output and self.log_z is None else self.log_z,
            cu_seqlens=self.packed.response_cu_seqlens,
            offsets=self.packed.response_offsets,
            credit=self.credit,
            rollout_logp=self.rollout_logp,
            group=self.group,
            groups=self.groups,
            value=self.value,
            prepared=self.prepared,
        )


def micro_batches(
    experience: Experience, models: Models, objective: Objective, config: Config, layout: Layout, step: int
) -> list[list[MicroBatch]]:
    """This rank's micro-batches of every update in the step, scored by the old policy, critic and reference.

    The old policy is scored before the first update, with the update's own micro-batches: then w = 1 exactly on the
    first. A step of one update has pi_old = pi_theta, and the update's own forward will do, but where the objective's
    `prepare` reads it. Where pi_old is the policy that wrote the answers, the engine has given its log-probs.
    Collective.
    """
    updates = plan(experience.sequences, *packing(experience, config, layout))
    packed = [batch for update in updates for batch in update]
    for batch in packed:
        batch.step = step
    models.gate.before_training(step, packed[0], config.rollout.temperature)
    batches = credited(packed, experience, objective, config, layout.device)
    batches = scored(batches, models, objective, config.rollout.temperature, updates=len(updates))
    if layout.is_last_stage:
        groups = len(experience.rollouts) // config.rollout.group_size
        inputs = [batch.loss_inputs() for batch in batches]
        prepared = objective.prepare(inputs, layout.dp_sum, groups)
        batches = [replace(batch, prepared=values) for batch, values in zip(batches, prepared, strict=True)]
    left = iter(batches)
    return [[next(left) for _ in update] for update in updates]


def credited(
    packed: list[PackedBatch], experience: Experience, objective: Objective, config: Config, device: Any
) -> list[MicroBatch]:
    """Attaches credit, group and the engine's log-probs to each packed batch.

    Raises ConfigError where the objective weighs by log-probs that the engine does not report.
    """
    by_behaviour = objective.is_old_behaviour(config.rollout.writes_ahead)
    if (objective.tis != "none" or by_behaviour) and not experience.has_rollout_logp:
        asks, fix = (f"objective.tis = {objective.tis}: weighs by", "objective.tis=none")
        if by_behaviour:
            asks, fix = f"objective.old = {objective.old}: its ratios are against", "objective.old=trainer"
        raise ConfigError(
            f"{asks} the engine's log-probs, and rollout.engine = {config.rollout.engine} has reported none; set "
            f"{fix}, or have it report them"
        )
    rewards = torch.tensor([score.reward for score in experience.scores], dtype=torch.float64)
    group = torch.arange(len(rewards)) // config.rollout.group_size
    credit, group = objective.credit(rewards, group).to(device), group.to(device)
    groups = len(rewards) // config.rollout.group_size
    log_z = None
    if experience.log_z is not None:
        log_z = torch.tensor(experience.log_z, dtype=torch.float64, device=device)

    def rollout_logp(batch: PackedBatch) -> Tensor | None:
        if not experience.has_rollout_logp:
            return None
        return torch.tensor([x for i in batch.index.tolist() for x in experience.rollouts[i].logp], device=device)

    return [
        MicroBatch(
            batch,
            credit[batch.index],
            group[batch.index],
            groups,
            log_z=None if log_z is None else log_z[batch.index],
            rollout_logp=rollout_logp(batch),
            by_behaviour=by_behaviour,
        )
        for batch in packed
    ]


def scored(
    batches: list[MicroBatch], models: Models, objective: Objective, temperature: float, updates: int
) -> list[MicroBatch]:
    """Attaches what the models give without gradient: old log-probs, values and reference log-probs. Collective."""
    packed = [batch.packed for batch in batches]
    # Of several updates all but the first would measure the mismatch to the engine with what the others have changed.
    prepared_by = objective.needs_old_logp and not batches[0].by_behaviour
    if updates > 1 or prepared_by or models.shares_trunk:
        old = models.policy.score(packed, temperature)  # [] but on the last pipeline stage
        if old:
            batches = [replace(b, old_logp=x.logp, value=x.value) for b, x in zip(batches, old, strict=True)]
    if models.critic is not None and (values := models.critic.score(packed)):
        batches = [replace(batch, value=value) for batch, value in zip(batches, values, strict=True)]
    if models.reference is not None:
        with models.reference_offload or nullcontext():
            reference = models.reference.score(packed, temperature)
        if reference:
            batches = [replace(b, ref_logp=x.logp) for b, x in zip(batches, reference, strict=True)]
    return batches


def packing(experience: Experience, config: Config, layout: Layout) -> tuple[int, Layout, int]:
    """How a step's sequences become micro-batches: the arguments of `plan` and `efficiency`."""
    per_update = config.batch.mini_batch or len(experience.sequences)
    return per_update, layout, config.batch.tokens_per_microbatch


def packing_efficiency(experience: Experience, config: Config, layout: Layout) -> float:
    """Rows of answers / rows that all replicas have time for, padding and waiting included."""
    return efficiency(experience.sequences, *packing(experience, config, layout))


def as_sequences(prompts: list[list[int]], rollouts: list[Rollout]) -> list[Sequence]:
    """Prompts (token ids) and their answers, prompt by prompt and equally many each, as sequences to pack."""
    answers = len(rollouts) // len(prompts)
    return [Sequence(i, prompts[i // answers], rollout.response) for i, rollout in enumerate(rollouts)]
