"""PPO: the clipped policy gradient with a critic.

Source: "Proximal Policy Optimization", arXiv 1707.06347, Eq. 7; with a language model's tokens as actions and the KL to
the reference in the reward: "Fine-Tuning Language Models from Human Preferences", arXiv 1909.08593, Eq. 2.

    r_t = [t is last] r(x, y) - kl_coef KL_t           (kl_in: reward)
    A_t = GAE(gamma, lam) of r_t and V_old             made mean 0, variance 1 over the step's tokens
    L   = mean over tokens of -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t) + kl_coef KL_t    (kl_in: loss)
    L_V = mean over tokens of 1/2 max((V - R)^2, (clip(V, V_old - c, V_old + c) - R)^2),   R = A + V_old
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, ValidationInfo, field_validator
from torch import Tensor

from flowrl_mega.metrics import FromMeans, Mean, Metric
from flowrl_mega.objectives.base import LossOutput, SumOverReplicas
from flowrl_mega.objectives.gae import gae
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.policy_gradient import TokenPolicyGradient, normalise_over_tokens
from flowrl_mega.settings import Needs

MOST_CHANGE = 0.2  # of the adaptive coefficient's relative error (arXiv 1909.08593, section 2.2)


class PPO(TokenPolicyGradient):
    """Settings of PPO. It needs a `critic` section beside it."""

    NEEDS: ClassVar[tuple[Needs, ...]] = (
        *TokenPolicyGradient.NEEDS,
        Needs("kl_in", "objective.kl_coef above 0", lambda o: o.kl_coef > 0),
        Needs("kl_horizon", "objective.kl_target", lambda o: o.kl_target is not None),
    )

    name: Literal["ppo"] = "ppo"
    gamma: float = Field(1.0, gt=0, le=1, description="discount of a token")
    lam: float = Field(1.0, ge=0, le=1, description="GAE: 1 is the answer's reward less the value, 0 one token ahead")
    normalise: bool = Field(True, description="advantages have mean 0 and variance 1 over the step's tokens")
    value_clip: float | None = Field(
        0.2, gt=0, allow_inf_nan=False, description="a value's change in a step that is learnt from; null: any"
    )
    kl_in: Literal["reward", "loss"] = Field("reward", description="where the KL to the reference counts")
    kl_target: float | None = Field(
        None, gt=0, allow_inf_nan=False, description="KL, nats a token, that kl_coef is adapted to; null: fixed"
    )
    kl_horizon: float = Field(10000, gt=0, allow_inf_nan=False, description="answers that adapting takes")

    @field_validator("kl_in")
    @classmethod
    def _pulls(cls, value: str, info: ValidationInfo) -> str:
        if value == "loss" and info.data.get("kl_coef") and info.data.get("kl_estimator") == "k1":
            raise ValueError(
                "pulls at nothing with objective.kl_estimator = k1, whose gradient is 0 on average; set kl_estimator "
                "to k2 or k3"
            )
        return value

    @field_validator("kl_target")
    @classmethod
    def _can_adapt(cls, value: float | None, info: ValidationInfo) -> float | None:
        if value is not None and info.data.get("kl_coef") == 0:
            raise ValueError(
                "is reached by factors on objective.kl_coef, and 0 stays 0; set kl_coef to what to start at"
            )
        return value

    @property
    def needs_critic(self) -> bool:
        return True

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0 and self.kl_in == "reward"

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The reward itself [N]: the critic is the baseline."""
        return rewards.double()

    @torch.no_grad()
    def prepare(
        self, batches: list[LossInputs], sum_over_replicas: SumOverReplicas, groups: int
    ) -> list[dict[str, Tensor]]:
        """Advantages and returns, "advantage" and "returns" [T]."""
        advantages, returns = [], []
        for s in batches:
            assert s.value is not None, "PPO needs the critic's values"
            advantages.append(gae(self.token_rewards(s), s.value, s.cu_seqlens, self.gamma, self.lam))
            returns.append(advantages[-1] + s.value.double())
        if self.normalise:
            advantages = normalise_over_tokens(advantages, sum_over_replicas)
        return [{"advantage": a, "returns": r} for a, r in zip(advantages, returns, strict=True)]

    def loss(self, s: LossInputs) -> LossOutput:
        return self.surrogate_loss(s, s.prepared["advantage"], kl_in_loss=self.kl_in == "loss")

    def value_loss(self, value: Tensor, s: LossInputs) -> LossOutput:
        assert s.value is not None, "PPO needs the critic's values"
        value, old, target = value.double(), s.value.double(), s.prepared["returns"]
        error = (value - target).square()
        clipped = torch.zeros_like(error)
        if self.value_clip is not None:
            bound = (old + (value - old).clamp(-self.value_clip, self.value_clip) - target).square()
            clipped = (bound > error).double()
            error = torch.maximum(error, bound)
        loss_sum, count = self.mean_of(s, error / 2)
        of_return = Mean(s.mean(target)), Mean(s.mean(target.square()))
        of_error = Mean(s.mean(target - value)), Mean(s.mean((target - value).square()))
        metrics: dict[str, Metric] = {
            "critic/value": Mean(s.mean(value)),
            "critic/return": of_return[0],
            "critic/value_clip_fraction": Mean(s.mean(clipped)),
            "critic/explained_variance": FromMeans(explained_variance, *of_return, *of_error),
        }
        return LossOutput(loss_sum, count, metrics)

    @property
    def adapts(self) -> tuple[str, ...]:
        return ("kl_coef",) if self.kl_target is not None else ()

    def adapted(self, metrics: Mapping[str, float], sequences: int) -> Self:
        """kl_coef times 1 + clip(kl / kl_target - 1, -0.2, 0.2) sequences / kl_horizon.

        Source: arXiv 1909.08593, section 2.2, with the KL per token, as in verl. A step of more sequences than the
        horizon counts as the horizon: the coefficient must not turn negative.
        """
        if self.kl_target is None:
            return self
        error = min(max(metrics["policy/kl_to_ref"] / self.kl_target - 1, -MOST_CHANGE), MOST_CHANGE)
        return self.model_copy(update={"kl_coef": self.kl_coef * (1 + error * min(sequences / self.kl_horizon, 1))})


def explained_variance(mean: float, mean_square: float, error_mean: float, error_mean_square: float) -> float:
    """1 - variance of R - V / variance of R, from the moments of the returns R and of the critic's errors R - V.

    It is 1 for a perfect critic, 0 for one that knows no more than the mean, and negative for a worse one.
    """
    variance = mean_square - mean**2
    return 1 - (error_mean_square - error_mean**2) / variance if variance > 1e-12 else 0.0
