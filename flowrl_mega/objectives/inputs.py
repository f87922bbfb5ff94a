"""What an objective gets to see of one micro-batch, and sums over its packed sequences.

Shapes: B sequences (responses) in a micro-batch, T response tokens in all, N responses in a whole step.
Log-probabilities are in nats. A token's value belongs to sequence b when cu_seqlens[b] <= t < cu_seqlens[b + 1].
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class LossInputs:
    """One micro-batch of B responses, packed: T response tokens in all, prompts left out.

    All log-probs are of the rollout distribution, log_softmax(logits / temperature), and scored by the trainer, but
    for `rollout_logp`: the engine that sampled the tokens may hold rounded weights, or those of an earlier step.
    """

    logp: Tensor  # [T] log pi_theta(y_t), with gradient
    old_logp: Tensor  # [T] log pi_old(y_t), of the policy that ratios are against (Objective.old)
    ref_logp: Tensor | None  # [T] log pi_ref(y_t); None when the objective needs no reference
    log_z: Tensor | None  # [B] log Z(x): learned, with gradient, or frozen; None where the objective has neither
    cu_seqlens: Tensor  # [B + 1] int64, starts at 0 and ends at T
    credit: Tensor  # [B] what `Objective.credit` gave these responses
    rollout_logp: Tensor | None = None  # [T] log-probs of the sampled tokens that the engine reported
    trainer_logp: Tensor | None = None  # [T] log-probs before the step's first update, where old_logp is not them
    group: Tensor | None = None  # [B] int64, each response's prompt, by its number in the step
    groups: int = 0  # prompts in the step; 0 where the groups are not known
    value: Tensor | None = None  # [T] the critic's V(x, y_<t), before the step's first update
    offsets: list[int] | None = None  # cu_seqlens on the host; without it they are read, for which a GPU is waited for
    prepared: Mapping[str, Tensor] = field(default_factory=dict)  # what `Objective.prepare` gave for this micro-batch

    def __post_init__(self) -> None:
        tokens, batch = self.logp.shape, self.credit.shape
        assert self.logp.dim() == 1 and self.credit.dim() == 1, "logp is [T] and credit [B]"
        assert self.old_logp.shape == tokens, f"old_logp {tuple(self.old_logp.shape)} is not [T] {tuple(tokens)}"
        assert self.ref_logp is None or self.ref_logp.shape == tokens, "ref_logp is not [T]"
        assert self.log_z is None or self.log_z.shape == batch, "log_z is not [B]"
        assert self.rollout_logp is None or self.rollout_logp.shape == tokens, "rollout_logp is not [T]"
        assert self.trainer_logp is None or self.trainer_logp.shape == tokens, "trainer_logp is not [T]"
        assert self.group is None or self.group.shape == batch, "group is not [B]"
        assert self.value is None or self.value.shape == tokens, "value is not [T]"
        assert self.cu_seqlens.shape == (batch[0] + 1,), "cu_seqlens is not [B + 1]"
        ends = self.offsets or self.cu_seqlens.tolist()
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
        """The trainer's log-probs before the first update less the engine's, [T] float64, without gradient."""
        assert self.rollout_logp is not None, "the engine's log-probs (rollout_logp) are missing"
        scored = self.old_logp if self.trainer_logp is None else self.trainer_logp
        return scored.detach().double() - self.rollout_logp.detach().double()


def segment_sum(values: Tensor, cu_seqlens: Tensor) -> Tensor:
    """Sums of packed values [T] over the B sequences of cu_seqlens [B + 1]: [B] float64, differentiable.

    In float64 because sums of log-ratios nearly cancel: over 8192 tokens float32 loses what the clip at 1 +- eps sees.
    """
    lengths = cu_seqlens.diff()
    rows = torch.arange(lengths.numel(), device=values.device)
    row_of_token = rows.repeat_interleave(lengths, output_size=values.numel())
    sums = torch.zeros(lengths.numel(), dtype=torch.float64, device=values.device)
    return sums.index_add(0, row_of_token, values.double())
