"""The base class of all objectives, their output, and the credits, estimates and metrics that they share.

Shapes as in inputs.py: B sequences (responses) in a micro-batch, T response tokens in all, N responses in a step.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl_mega.config import LogZ
from flowrl_mega.metrics import FromMeans, Max, Mean, Report
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.settings import Needs, Settings

SumOverReplicas = Callable[[Tensor], Tensor]  # all-reduces (sum) a tensor over the data-parallel replicas

STD_EPS = 1e-6  # added to a group's standard deviation, as the authors' code does
LARGEST_LOG_WEIGHT = 300.0  # of an answer: the sum over a step of e^(2 * 300) is still a float64


@dataclass(frozen=True)
class LossOutput:
    """What an objective returns for one micro-batch."""

    loss_sum: Tensor  # 0-dim float64, a SUM; the trainer divides once, by the counts of the whole update
    count: int  # B, or T where the loss is a mean over tokens
    metrics: (
        Report  # by name, group first ("policy/mean_logp"): Mean(values [B]) or another type of flowrl_mega.metrics
    )
    answers: Mapping[str, Tensor] = field(default_factory=dict)  # [B] each: the fields of monitor's Residuals, or none


class Objective(Settings):
    """Base of all objectives: settings and pure functions. No Megatron and no torch.distributed in here."""

    NEEDS: ClassVar[tuple[Needs, ...]] = (Needs("tis_cap", "objective.tis", lambda o: o.tis != "none"),)

    name: str
    old: Literal["trainer", "behaviour", "decoupled"] | None = Field(
        None,
        description="pi_old of every ratio: the trainer's weights before the step, those that wrote each token, or the "
        "trainer's with tis for the rest; null: behaviour where answers may be of older weights and tis is none",
    )
    # An objective whose loss has no tokens narrows this to the first three.
    tis: Literal["none", "sum", "mean", "token"] = Field(
        "none", description="weight pi_old / pi_rollout: of the answer, of its mean token, or each token's own"
    )
    tis_cap: float = Field(2.0, gt=0, description="the most that the weight of tis can be")

    @model_validator(mode="after")
    def _corrects_once(self) -> Self:
        if self.old == "decoupled" and self.tis == "none":
            raise ValueError(
                "old = decoupled weighs by pi_old / pi_rollout; set objective.tis (token, or sum for whole answers)"
            )
        if self.old == "behaviour" and self.tis != "none":
            raise ValueError(
                f"old = behaviour has the engine's log-probs in every ratio, and objective.tis = {self.tis} would "
                "correct for them again; leave it out, or set objective.old=decoupled"
            )
        return self

    def is_old_behaviour(self, stale: bool) -> bool:
        """Whether pi_old is the policy that wrote the answers; `stale`: they may be of older weights."""
        return self.old == "behaviour" or (self.old is None and stale and self.tis == "none")

    @property
    def needs_reference(self) -> bool:
        """Whether `LossInputs.ref_logp` must be given."""
        return False

    @property
    def log_z(self) -> LogZ | None:
        """Which partition function to build; None when the objective has none. `LossInputs.log_z` is given where it is
        learned or frozen, and None otherwise."""
        return None

    @property
    def reference_answers(self) -> int:
        """To how many of the reference's own answers to each prompt `frozen_log_z` is to be applied, before the first
        step; 0: it is not called."""
        return 0

    def frozen_log_z(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        """[P] float64, `LossInputs.log_z` of P prompts in all of the run, from rewards [P, N] and lengths [P, N] of
        the reference's answers."""
        raise NotImplementedError(f"{self.name} has no frozen log Z")

    @property
    def needs_critic(self) -> bool:
        """Whether `LossInputs.value` must be given, and `value_loss` trained."""
        return False

    @property
    def needs_old_logp(self) -> bool:
        """Whether `prepare` reads `LossInputs.old_logp`; NaN is in it otherwise, where a step has one update."""
        return False

    @abstractmethod
    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Rewards [N] to credits [N] float64; called once a step on the whole batch. group [N] int64 names each
        response's prompt: any ids, any order, groups of any size."""

    def prepare(
        self, batches: list[LossInputs], sum_over_replicas: SumOverReplicas, groups: int
    ) -> list[dict[str, Tensor]]:
        """Step-wide tensors (such as normalised advantages), one dict per micro-batch: `LossInputs.prepared`.

        Called once per step, before the first update, with this rank's micro-batches as pi_old has scored them (logp is
        old_logp). Every replica must call `sum_over_replicas` equally often; `groups` is the number of prompts in the
        step.
        """
        return [{} for _ in batches]

    @abstractmethod
    def loss(self, s: LossInputs) -> LossOutput:
        """The loss of one micro-batch, summed. Its metrics include `mismatch_metrics`."""

    def value_loss(self, value: Tensor, s: LossInputs) -> LossOutput:
        """The critic's loss from its values [T], with gradient. Called only if `needs_critic`."""
        raise NotImplementedError(f"{self.name} has no critic")

    @property
    def adapts(self) -> tuple[str, ...]:
        """Names of the fields that `adapted` changes; checkpoints keep their values."""
        return ()

    def adapted(self, metrics: Mapping[str, float], sequences: int) -> Self:
        """The next step's objective, from this step's metrics (by name) and its number of sequences."""
        return self

    def tis_weight(self, s: LossInputs) -> tuple[Tensor, Report]:
        """Truncated importance sampling: min(pi_old / pi_rollout, tis_cap), float64 without gradient, and its metrics.

        Source: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025. For "sum" and "mean" the
        weight is [B], from the sum or mean over each answer's tokens of log pi_old - log pi_rollout; for "token" it is
        [T]; for "none" it is 1, [B]. Metrics: the weight, and the fraction of weights that the cap changed.
        """
        if self.tis == "none":
            return torch.ones_like(s.credit, dtype=torch.float64), {}
        mismatch = s.mismatch()
        by_token = self.tis == "token"
        ratio = (mismatch if by_token else s.sum(mismatch) if self.tis == "sum" else s.mean(mismatch)).exp()
        weight, clipped = ratio.clamp(max=self.tis_cap), (ratio > self.tis_cap).double()
        by_answer = (s.mean(weight), s.mean(clipped)) if by_token else (weight, clipped)
        return weight, {"mismatch/tis_weight": Mean(by_answer[0]), "mismatch/tis_clipped": Mean(by_answer[1])}


def group_sums(
    batches: list[LossInputs], values: list[Tensor], groups: int, sum_over_replicas: SumOverReplicas
) -> Tensor:
    """Sums over each prompt's answers on all replicas, [2, groups] float64: of the values (a tensor [B] a micro-batch),
    and of ones."""
    sums = torch.zeros(2, groups, dtype=torch.float64, device=batches[0].credit.device)
    for s, of_batch in zip(batches, values, strict=True):
        assert s.group is not None, "the prompts' groups must be known"
        sums[0].index_add_(0, s.group, of_batch)
        sums[1].index_add_(0, s.group, torch.ones_like(of_batch))
    return sum_over_replicas(sums)


def mismatch_metrics(s: LossInputs) -> Report:
    """How far the engine's log-probs are from the trainer's; empty if the engine reported none.

    abs_logp_diff: |old - rollout| in nats, the token mean of each answer; a short answer counts as much as a long one.
    max_abs_logp_diff: its largest token.  abs_sum_logp_diff: |the sum of old - rollout| of an answer, in nats.
    kl: KL(engine || trainer) per token, estimated (k3).  effective_sample_size: of the answers' untruncated importance
    weights pi_old(y|x) / pi_rollout(y|x).
    """
    if s.rollout_logp is None:
        return {}
    mismatch = s.mismatch()
    log_weight = s.sum(mismatch).clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    return {
        "mismatch/abs_logp_diff": Mean(s.mean(mismatch.abs())),
        "mismatch/max_abs_logp_diff": Max(s.max(mismatch.abs())),
        "mismatch/abs_sum_logp_diff": Mean(s.sum(mismatch).abs()),
        "mismatch/kl": Mean(s.mean(k3(mismatch))),
        "mismatch/effective_sample_size": FromMeans(
            effective_sample_size, Mean(log_weight.exp()), Mean((2 * log_weight).exp())
        ),
    }


def effective_sample_size(mean: float, mean_square: float) -> float:
    """Kish's effective sample size divided by n, in (0, 1], from the mean and the mean square of n importance weights.

    It is 1 if all weights are equal and 1/n if one of them outweighs the others. (Kish, "Survey Sampling", 1965.)
    """
    return mean * mean / mean_square


def k3(log_ratio: Tensor) -> Tensor:
    """KL(p || q) per token [T] from log q - log p [T]: >= 0, unbiased for tokens drawn from p.

    Source: "DeepSeekMath", arXiv 2402.03300, Eq. 4.
    """
    return torch.expm1(log_ratio) - log_ratio


def group_normalise(rewards: Tensor, group: Tensor, divide: bool = True) -> Tensor:
    """(r - mean_group) / (std_group + 1e-6), unbiased std; a group of one has mean 0 and std 1. [N] -> [N] float64.

    Source: FlowRL's r_hat and GRPO's advantage, as the authors' code computes both. A uniform group gives 0. Without
    `divide` r - mean_group alone ("Dr. GRPO", arXiv 2503.20783).
    """
    assert rewards.shape == group.shape and rewards.dim() == 1, "rewards and group are both [N]"
    r = rewards.double()
    _, row = torch.unique(group, return_inverse=True)
    size = torch.bincount(row).double()
    alone = size == 1
    mean = (r.new_zeros(size.shape).index_add(0, row, r) / size).masked_fill(alone, 0.0)
    centred = r - mean[row]
    if not divide:
        return centred
    variance = r.new_zeros(size.shape).index_add(0, row, centred.square()) / (size - 1).clamp(min=1)
    std = variance.sqrt().masked_fill(alone, 1.0)
    return centred / (std[row] + STD_EPS)
