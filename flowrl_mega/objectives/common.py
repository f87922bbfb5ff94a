"""What every objective shares: its input, its output, its base class, and sums over packed sequences.

Shapes: B sequences (responses) in a micro-batch, T response tokens in all, N responses in a whole step.
Log-probabilities are in nats. A token's value belongs to sequence b when cu_seqlens[b] <= t < cu_seqlens[b + 1].
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field
from torch import Tensor

from flowrl_mega.config import LogZ
from flowrl_mega.settings import Needs, Settings

Total = Callable[[Tensor], Tensor]  # adds a tensor up over the data-parallel replicas

STD_EPS = 1e-6  # added to a group's standard deviation, as the authors' code does
LARGEST_LOG_WEIGHT = 300.0  # of a trajectory: the sum over a step of e^(2 * 300) is still a float64


@dataclass(frozen=True)
class Sequences:
    """One micro-batch of B responses, packed: T response tokens in all, prompts left out.

    All log-probs are of the rollout distribution, log_softmax(logits / temperature), and scored by the trainer, but
    for `rollout_logp`: the engine that sampled the tokens may hold rounded weights, or those of an earlier step.
    """

    logp: Tensor  # [T] log pi_theta(y_t), with gradient
    old_logp: Tensor  # [T] log pi_old(y_t)
    ref_logp: Tensor | None  # [T] log pi_ref(y_t); None when the objective needs no reference
    log_z: Tensor | None  # [B] log Z_phi(x), with gradient; None when there is no partition function or log Z = 0
    cu_seqlens: Tensor  # [B + 1] int64, starts at 0 and ends at T
    credit: Tensor  # [B] what `Objective.credit` gave these responses
    rollout_logp: Tensor | None = None  # [T] log-probs of the sampled tokens that the engine reported
    group: Tensor | None = None  # [B] int64, each response's prompt, by its number in the step
    value: Tensor | None = None  # [T] the critic's V(x, y_<t), before the step's first update
    prepared: Mapping[str, Tensor] = field(default_factory=dict)  # what `Objective.prepare` gave for this micro-batch

    def __post_init__(self) -> None:
        tokens, batch = self.logp.shape, self.credit.shape
        assert self.logp.dim() == 1 and self.credit.dim() == 1, "logp is [T] and credit [B]"
        assert self.old_logp.shape == tokens, f"old_logp {tuple(self.old_logp.shape)} is not [T] {tuple(tokens)}"
        assert self.ref_logp is None or self.ref_logp.shape == tokens, "ref_logp is not [T]"
        assert self.log_z is None or self.log_z.shape == batch, "log_z is not [B]"
        assert self.rollout_logp is None or self.rollout_logp.shape == tokens, "rollout_logp is not [T]"
        assert self.group is None or self.group.shape == batch, "group is not [B]"
        assert self.value is None or self.value.shape == tokens, "value is not [T]"
        assert self.cu_seqlens.shape == (batch[0] + 1,), "cu_seqlens is not [B + 1]"
        ends = self.cu_seqlens.tolist()
        assert ends[0] == 0 and ends[-1] == tokens[0], f"cu_seqlens spans {ends[0]}..{ends[-1]}, not 0..{tokens[0]}"
        # 1/|y| needs a token, and an empty answer still has its end token.
        assert all(a < b for a, b in pairwise(ends)), "every response has at least one token"

    @property
    def length(self) -> Tensor:
        """|y|, [B] int64."""
        return self.cu_seqlens.diff()

    def sum(self, values: Tensor) -> Tensor:
        """Per-sequence sums, [T] -> [B] float64."""
        return segment_sum(values, self.cu_seqlens)

    def mean(self, values: Tensor) -> Tensor:
        """Per-sequence token means, [T] -> [B] float64."""
        return self.sum(values) / self.length

    def max(self, values: Tensor) -> Tensor:
        """Per-sequence maxima, [T] -> [B] float64."""
        row_of_token = self.per_token(torch.arange(len(self.credit), device=values.device))
        return values.new_zeros(len(self.credit), dtype=torch.float64).scatter_reduce(
            0, row_of_token, values.double(), "amax", include_self=False
        )

    def per_token(self, values: Tensor) -> Tensor:
        """Each sequence's value at each of its tokens, [B] -> [T]."""
        return values.repeat_interleave(self.length, output_size=self.logp.numel())

    def log_ratio(self) -> Tensor:
        """d_t = log pi_theta(y_t) - log pi_old(y_t), [T] float64, with gradient."""
        return self.logp.double() - self.old_logp.double()

    def mismatch(self) -> Tensor:
        """log pi_old(y_t) - log pi_rollout(y_t), [T] float64, without gradient: what the trainer gives the tokens more
        than the engine that sampled them."""
        assert self.rollout_logp is not None, "the engine's log-probs (rollout_logp) are missing"
        return self.old_logp.detach().double() - self.rollout_logp.detach().double()


@dataclass(frozen=True)
class LossOutput:
    """An objective's answer for one micro-batch."""

    loss_sum: Tensor  # 0-dim float64, a SUM; the trainer divides once, by the counts of the whole update
    count: int  # B, or T where the loss is a mean over tokens
    metrics: dict[str, Tensor]  # each [B], detached; logged as the step's mean, or its maximum when named "max_..."


class Objective(Settings):
    """Base of all objectives: settings and pure functions. No Megatron and no torch.distributed in here."""

    NEEDS: ClassVar[tuple[Needs, ...]] = (Needs("tis_cap", "objective.tis", lambda o: o.tis != "none"),)

    name: str
    # An objective whose loss has no tokens narrows this to the first three.
    tis: Literal["none", "sum", "mean", "token"] = Field(
        "none", description="weight pi_old / pi_rollout: of the answer, of its mean token, or each token's own"
    )
    tis_cap: float = Field(2.0, gt=0, description="the most that the weight of tis can be")

    @property
    def needs_reference(self) -> bool:
        """Whether `Sequences.ref_logp` must be given."""
        return False

    @property
    def log_z(self) -> LogZ | None:
        """Which partition function to build; None when the objective has none. `Sequences.log_z` is given where it is
        learned, and None otherwise."""
        return None

    @property
    def needs_critic(self) -> bool:
        """Whether `Sequences.value` must be given, and `value_loss` trained."""
        return False

    @property
    def needs_old_logp(self) -> bool:
        """Whether `prepare` reads `Sequences.old_logp`; NaN is in it otherwise, where a step has one update."""
        return False

    @abstractmethod
    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """Rewards [N] to credits [N] float64; called once a step on the whole batch. group [N] int64 names each
        response's prompt: any ids, any order, groups of any size."""

    def prepare(self, batches: list[Sequences], total: Total, groups: int) -> list[dict[str, Tensor]]:
        """What the loss needs of the whole step, by micro-batch: `Sequences.prepared` of all its updates.

        Called once a step, before the first update, with this rank's micro-batches as pi_old has scored them (logp is
        old_logp). `total` adds a tensor up over the data-parallel replicas, which all call it alike; `groups` is the
        number of prompts in the step.
        """
        return [{} for _ in batches]

    @abstractmethod
    def loss(self, s: Sequences) -> LossOutput:
        """The loss of one micro-batch, summed. Its metrics include `mismatch_metrics`."""

    def value_loss(self, value: Tensor, s: Sequences) -> LossOutput:
        """The critic's loss from its values [T], with gradient; only where `needs_critic`."""
        raise NotImplementedError(f"{self.name} has no critic")

    @property
    def adapts(self) -> tuple[str, ...]:
        """The fields that `adapted` changes, which checkpoints keep."""
        return ()

    def adapted(self, metrics: Mapping[str, float], sequences: int) -> Self:
        """The objective of the next step, from this step's metrics and its number of sequences."""
        return self

    def tis_weight(self, s: Sequences) -> tuple[Tensor, dict[str, Tensor]]:
        """Truncated importance sampling: min(pi_old / pi_rollout, tis_cap), float64 without gradient, and its metrics.

        Source: "Your Efficient RL Framework Secretly Brings You Off-Policy RL Training", 2025. The weight is [B] with
        the ratio exp(sum or mean over the answer's tokens of log pi_old - log pi_rollout), [T] for "token", and 1 for
        "none". Metrics, [B] each: the weight and where the cap was used (of "token" means over the tokens).
        """
        if self.tis == "none":
            return torch.ones_like(s.credit, dtype=torch.float64), {}
        mismatch = s.mismatch()
        by_token = self.tis == "token"
        ratio = (mismatch if by_token else s.sum(mismatch) if self.tis == "sum" else s.mean(mismatch)).exp()
        weight, clipped = ratio.clamp(max=self.tis_cap), (ratio > self.tis_cap).double()
        if by_token:
            return weight, {"tis_weight": s.mean(weight), "tis_clipped": s.mean(clipped)}
        return weight, {"tis_weight": weight, "tis_clipped": clipped}


def mismatch_metrics(s: Sequences) -> dict[str, Tensor]:
    """How far the engine's log-probs are from the trainer's, [B] float64 each; nothing where none were given.

    mismatch_abs_logp: |old - rollout| in nats, the token mean of each answer (so the step logs a mean over answers, in
    which a short one counts as much as a long one).  max_mismatch: its largest token.  mismatch_kl: KL(engine ||
    trainer) a token, estimated (k3).  is_weight, is_weight_sq: pi_old(y|x) / pi_rollout(y|x) and its square, not
    truncated; the monitor makes `effective_sample_size` of them.
    """
    if s.rollout_logp is None:
        return {}
    mismatch = s.mismatch()
    log_weight = s.sum(mismatch).clamp(-LARGEST_LOG_WEIGHT, LARGEST_LOG_WEIGHT)
    return {
        "mismatch_abs_logp": s.mean(mismatch.abs()),
        "max_mismatch": s.max(mismatch.abs()),
        "mismatch_kl": s.mean(k3(mismatch)),
        "is_weight": log_weight.exp(),
        "is_weight_sq": (2 * log_weight).exp(),
    }


def k3(log_ratio: Tensor) -> Tensor:
    """KL(p || q) per token [T] from log q - log p [T]: >= 0, unbiased for tokens drawn from p.

    Source: "DeepSeekMath", arXiv 2402.03300, Eq. 4.
    """
    return torch.expm1(log_ratio) - log_ratio


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of packed values [T] over the B sequences of cu_seqlens [B + 1]: [B] float64, differentiable.

    In float64 because sums of log-ratios nearly cancel: over 8192 tokens float32 loses what the clip at 1 +- eps sees.
    """
    lengths = cu_seqlens.diff()
    rows = torch.arange(lengths.numel(), device=values.device)
    row_of_token = rows.repeat_interleave(lengths, output_size=values.numel())
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=values.device)
    return sums.index_add(0, row_of_token, values.double())


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
