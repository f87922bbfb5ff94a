"""GRPO: the clipped policy gradient with group-normalised advantages.

Source: "DeepSeekMath", arXiv 2402.03300, Eq. 3 (objective) and Eq. 4 (the KL estimator, "k3"):

    rho_t = pi_theta(y_t) / pi_old(y_t)
    k3_t  = pi_ref(y_t) / pi_theta(y_t) - log(pi_ref(y_t) / pi_theta(y_t)) - 1
    L     = mean over sequences of (1/|y|) sum_t [ -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A) + kl_coef k3_t ]

`loss_mean: token` and `clip_eps_high: 0.28` are DAPO's (arXiv 2503.14476), whose dynamic sampling is the rollout's
`drop_uniform`, and its overlong penalty the reward's; `std: false` and `loss_mean: sum` are Dr. GRPO's (arXiv
2503.20783), up to the constant that its sums are divided by.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from flowrl_mega.objectives.base import LossOutput, group_normalise
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.policy_gradient import PolicyGradient


class GRPO(PolicyGradient):
    """Settings of GRPO. kl_coef = 0 is plain GRPO, which needs no reference."""

    name: Literal["grpo"] = "grpo"
    std: bool = Field(True, description="advantages are divided by the group's standard deviation")

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The advantage A [N]."""
        return group_normalise(rewards, group, divide=self.std)

    def loss(self, s: LossInputs) -> LossOutput:
        return self.surrogate_loss(s, s.per_token(s.credit.double()), kl_in_loss=True)
