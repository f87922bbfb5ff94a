"""CISPO: the policy gradient of every token, with an importance weight that is clipped instead of the surrogate.

Source: "MiniMax-M1", arXiv 2506.13585, Eq. 4-5:

    rho_t = pi_theta(y_t) / pi_old(y_t)
    L     = mean over tokens of -clip(rho_t, 1 - clip_eps, 1 + clip_eps_high) A log pi_theta(y_t),   the weight detached

No token's gradient is cut to 0, as the clipped surrogate does to those that have moved too far.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from flowrl_mega.objectives.base import LossOutput, group_normalise
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.policy_gradient import PolicyGradient, SurrogateTerms


class CISPO(PolicyGradient):
    """Settings of CISPO. The paper has no lower bound in use, and gives no upper one; 0.2 is verl's."""

    name: Literal["cispo"] = "cispo"
    clip_eps: float | None = Field(None, gt=0, lt=1, description="a weight is at least 1 - clip_eps; null: any")  # type: ignore[assignment]
    clip_eps_high: float = Field(0.2, gt=0, allow_inf_nan=False, description="a weight is at most 1 + clip_eps_high")
    std: bool = Field(True, description="advantages are divided by the group's standard deviation")
    loss_mean: Literal["sequence", "token", "sum"] = Field(
        "token",
        description="of an update: mean over its answers of their token means or token sums, or over all its tokens",
    )

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The advantage A [N]."""
        return group_normalise(rewards, group, divide=self.std)

    def surrogate(self, s: LossInputs, advantage: Tensor) -> SurrogateTerms:
        ratio = s.log_ratio().exp()
        low = None if self.clip_eps is None else 1 - self.clip_eps
        weight = ratio.detach().clamp(low, 1 + self.clip_eps_high)
        clipped = (weight != ratio.detach()).to(ratio.dtype)
        return SurrogateTerms(-weight * advantage.double() * s.logp.double(), ratio, clipped)

    def loss(self, s: LossInputs) -> LossOutput:
        return self.surrogate_loss(s, s.per_token(s.credit.double()), kl_in_loss=True)
