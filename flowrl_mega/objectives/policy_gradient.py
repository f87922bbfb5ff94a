"""Shared by the clipped policy gradients (PPO, GRPO, REINFORCE++): surrogate, KL term, importance weight, means."""

from __future__ import annotations

from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flowrl_mega.metrics import Max, Mean, Metric
from flowrl_mega.objectives.base import LossOutput, Objective, SumOverReplicas, k3, mismatch_metrics
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.settings import Needs

KlEstimator = Literal["k1", "k2", "k3"]
VARIANCE_EPS = 1e-8  # added to the variance of advantages, as verl and OpenRLHF do


class SurrogateTerms(NamedTuple):
    """Each [T]."""

    loss: Tensor  # the negative clipped surrogate, with gradient
    ratio: Tensor  # rho_t, with gradient
    clipped: Tensor  # 1.0 where the clip is what the min chose, so no gradient passes, else 0.0


def clipped_surrogate(log_ratio: Tensor, advantage: Tensor, clip_eps: float, clip_eps_high: float) -> SurrogateTerms:
    """-min(rho A, clip(rho, 1 - clip_eps, 1 + clip_eps_high) A) from log rho [T] and A [T].

    Source: "Proximal Policy Optimization", arXiv 1707.06347, Eq. 7; two bounds: "DAPO", arXiv 2503.14476.
    """
    ratio = log_ratio.exp()
    free = ratio * advantage
    bound = ratio.clamp(1 - clip_eps, 1 + clip_eps_high) * advantage
    return SurrogateTerms(-torch.minimum(free, bound), ratio, (bound < free).to(ratio.dtype))


def kl_estimate(logp: Tensor, ref_logp: Tensor, estimator: KlEstimator) -> Tensor:
    """KL(pi || pi_ref) at each token, [T] float64, estimated from the token that pi has drawn.

    Source: Schulman, "Approximating KL divergence", 2020. k1: log(pi / pi_ref), unbiased, but its gradient says nothing
    of the KL.  k2: its square / 2, biased, but with the KL's gradient.  k3: unbiased and >= 0.
    """
    log_ratio = logp.double() - ref_logp.double()
    if estimator == "k1":
        return log_ratio
    return log_ratio.square() / 2 if estimator == "k2" else k3(-log_ratio)


def normalise_over_tokens(values: list[Tensor], sum_over_replicas: SumOverReplicas) -> list[Tensor]:
    """(v - mean) / sqrt(variance + 1e-8) over all tokens of the step, on all replicas; unbiased variance.

    values: one tensor [T] per micro-batch; the result has the same shapes, in float64.
    """
    device = values[0].device
    count = torch.tensor(float(sum(v.numel() for v in values)), dtype=torch.float64, device=device)
    count, summed = sum_over_replicas(torch.stack([count, torch.stack([v.double().sum() for v in values]).sum()]))
    mean = summed / count
    squares = sum_over_replicas(torch.stack([(v.double() - mean).square().sum() for v in values]).sum())
    std = (squares / (count - 1).clamp(min=1) + VARIANCE_EPS).sqrt()
    return [(v.double() - mean) / std for v in values]


class PolicyGradient(Objective):
    """Base of the clipped policy gradients: settings and loss; each subclass brings its own advantages."""

    NEEDS: ClassVar[tuple[Needs, ...]] = (
        *Objective.NEEDS,
        Needs("kl_estimator", "objective.kl_coef above 0", lambda o: o.kl_coef > 0),
    )
    clip_eps: float = Field(0.2, gt=0, lt=1, description="the ratio's lower bound is 1 - clip_eps")
    clip_eps_high: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="the upper bound is 1 + clip_eps_high; null: clip_eps"
    )
    kl_coef: float = Field(0.0, ge=0, allow_inf_nan=False, description="weight of the KL to the reference, per token")
    kl_estimator: KlEstimator = Field("k3", description="of a token's KL: log-ratio, half its square, or unbiased >= 0")
    loss_mean: Literal["sequence", "token", "sum"] = Field(
        "sequence",
        description="of an update: mean over its answers of their token means or token sums, or over all its tokens",
    )

    @property
    def needs_reference(self) -> bool:
        return self.kl_coef > 0

    def mean_of(self, s: LossInputs, values: Tensor) -> tuple[Tensor, int]:
        """Values [T] as a sum and the count to divide it by, as `loss_mean` says."""
        if self.loss_mean == "token":
            return values.double().sum(), values.numel()
        return (s.sum(values) if self.loss_mean == "sum" else s.mean(values)).sum(), len(s.credit)

    def surrogate(self, s: LossInputs, advantage: Tensor) -> SurrogateTerms:
        """What is averaged, from the advantages [T]."""
        high = self.clip_eps if self.clip_eps_high is None else self.clip_eps_high
        return clipped_surrogate(s.log_ratio(), advantage.double(), self.clip_eps, high)

    def surrogate_loss(self, s: LossInputs, advantage: Tensor, kl_in_loss: bool) -> LossOutput:
        """The surrogate of the advantages [T], and the KL term where it is part of the loss."""
        terms = self.surrogate(s, advantage)
        # tis weighs the surrogate alone: the KL term stays the pull to the reference that kl_coef names.
        tis_weight, tis_metrics = self.tis_weight(s)
        loss = terms.loss * (tis_weight if self.tis == "token" else s.per_token(tis_weight))
        metrics: dict[str, Metric] = {
            "loss/advantage": Mean(s.mean(advantage)),
            "policy/ratio": Mean(s.mean(terms.ratio)),
            "policy/clip_fraction": Mean(s.mean(terms.clipped)),
            "policy/mean_logp": Mean(s.mean(s.logp)),
            "policy/max_abs_log_ratio": Max(s.sum(s.log_ratio()).abs()),
            **tis_metrics,
            **mismatch_metrics(s),
        }
        if self.kl_coef > 0:
            assert s.ref_logp is not None, f"{self.name} with kl_coef > 0 needs the reference's log-probs"
            kl = kl_estimate(s.logp, s.ref_logp, self.kl_estimator)
            if kl_in_loss:
                loss = loss + self.kl_coef * kl
            metrics["policy/kl_to_ref"] = Mean(s.mean(kl))
        loss_sum, count = self.mean_of(s, loss)
        return LossOutput(loss_sum, count, metrics)


class TokenPolicyGradient(PolicyGradient):
    """Base for objectives with per-token advantages and an optional KL-in-reward."""

    kl_estimator: KlEstimator = Field("k1", description="of a token's KL: log-ratio, half its square, or unbiased >= 0")
    loss_mean: Literal["sequence", "token", "sum"] = Field(
        "token",
        description="of an update: mean over its answers of their token means or token sums, or over all its tokens",
    )

    @property
    @abstractmethod
    def kl_in_reward(self) -> bool:
        """Whether kl_coef counts in the reward."""

    @property
    def needs_old_logp(self) -> bool:
        return self.kl_in_reward

    def token_rewards(self, s: LossInputs) -> Tensor:
        """Per-token rewards, [T] float64: each answer's credit at its last token; with `kl_in_reward`, every token's
        has kl_coef KL(pi_old || pi_ref) taken off."""
        reward = torch.zeros(s.logp.numel(), dtype=torch.float64, device=s.logp.device)
        reward[s.cu_seqlens[1:] - 1] = s.credit.double()
        if not self.kl_in_reward:
            return reward
        assert s.ref_logp is not None, f"{self.name} with kl_coef > 0 needs the reference's log-probs"
        return reward - self.kl_coef * kl_estimate(s.old_logp, s.ref_logp, self.kl_estimator)
