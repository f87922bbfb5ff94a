"""GRPO: the clipped policy gradient with group-normalised advantages.

Source: "DeepSeekMath", arXiv 2402.03300, Eq. 3 (objective) and Eq. 4 (the KL estimator, "k3"):

    rho_t = pi_theta(y_t) / pi_old(y_t)
    k3_t  = pi_ref(y_t) / pi_theta(y_t) - log(pi_ref(y_t) / pi_theta(y_t)) - 1
    L     = mean over sequences of (1/|y|) sum_t [ -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A) + kl_coef k3_t ]
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flowrl_mega.objectives.common import LossOutput, Objective, Sequences, group_normalise, k3, mismatch_metrics


class SurrogateTerms(NamedTuple):
    """Each [T]."""

    loss: Tensor  # the negative clipped surrogate, with gradient
    ratio: Tensor  # rho_t, with gradient
    clipped: Tensor  # 1.0 where the clip is what the min chose, so no gradient passes, else 0.0


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_eps: float, clip_eps_high: float) -> SurrogateTerms:
    """-min(rho A, clip(rho, 1 - clip_eps, 1 + clip_eps_high) A) from log rho [T] and A [T] (Eq. 3)."""
    ratio = log_ratio.exp()
    free = ratio * advantage
    bound = ratio.clamp(1 - clip_eps, 1 + clip_eps_high) * advantage
    return SurrogateTerms(-torch.minimum(free, bound), ratio, (bound < free).to(ratio.dtype))


class GRPO(Objective):
    """Settings of GRPO. kl_coef = 0 is plain GRPO, which needs no reference."""

    name: Literal["grpo"] = "grpo"
    clip_eps: float = Field(0.2, gt=0, lt=1, description="the ratio's lower bound is 1 - clip_eps")
    clip_eps_high: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the upper bound is 1 + clip_eps_high; null: clip_eps"
    )
    kl_coef: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight of the KL term, per token")

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    @property
    def log_z(self) -> None:
        return None

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The advantage A [N]."""
        return group_normalise(rewards, group)

    def loss(self, s: Sequences) -> LossOutput:
        advantage = s.credit.double()
        high = self.clip_eps if self.clip_eps_high is None else self.clip_eps_high
        log_ratio = s.log_ratio()
        terms = clipped_surrogate(log_ratio, s.per_token(advantage), self.clip_eps, high)
        # tis weighs the surrogate alone: the KL term stays the pull to the reference that kl_coef names.
        tis_weight, tis_metrics = self.tis_weight(s)
        loss = s.mean(terms.loss * (tis_weight if self.tis == "token" else s.per_token(tis_weight)))
        metrics = {
            "advantage": advantage,
            "ratio": s.mean(terms.ratio),
            "clip_fraction": s.mean(terms.clipped),
            "mean_logp": s.mean(s.logp),
            "max_abs_sum_d": s.sum(log_ratio).abs(),
            **tis_metrics,
            **mismatch_metrics(s),
        }
        if self.kl_coef > 0:
            assert s.ref_logp is not None, "GRPO with kl_coef > 0 needs the reference's log-probs"
            kl = s.mean(k3(s.ref_logp.double() - s.logp.double()))
            loss = loss + self.kl_coef * kl
            metrics["kl"] = kl
        return LossOutput(loss.sum(), len(advantage), {k: v.detach() for k, v in metrics.items()})
