"""GSPO: the clipped policy gradient with one ratio per answer, that of its mean token.

Source: "Group Sequence Policy Optimization", arXiv 2507.18071, Eq. 5-7:

    s = (pi_theta(y|x) / pi_old(y|x))^(1/|y|)
    L = mean over sequences of -min(s A, clip(s, 1 - eps, 1 + eps_high) A)
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from flowrl_mega.metrics import Max, Mean
from flowrl_mega.objectives.base import LossOutput, Objective, group_normalise, mismatch_metrics
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.policy_gradient import clipped_surrogate


class GSPO(Objective):
    """Settings of GSPO; the clip is the paper's (section 5.1), narrow because the ratio is that of a mean."""

    name: Literal["gspo"] = "gspo"
    clip_eps: float = Field(3e-4, gt=0, lt=1, description="the ratio's lower bound is 1 - clip_eps")
    clip_eps_high: float = Field(4e-4, gt=0, allow_inf_nan=False, description="the upper bound is 1 + clip_eps_high")
    std: bool = Field(True, description="advantages are divided by the group's standard deviation")
    tis: Literal["none", "sum", "mean"] = Field(
        "none", description="weight pi_old / pi_rollout of the answer, or of its mean token"
    )

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The advantage A [N]."""
        return group_normalise(rewards, group, divide=self.std)

    def loss(self, s: LossInputs) -> LossOutput:
        advantage, log_ratio = s.credit.double(), s.log_ratio()
        terms = clipped_surrogate(s.mean(log_ratio), advantage, self.clip_eps, self.clip_eps_high)
        tis_weight, tis_metrics = self.tis_weight(s)
        metrics = {
            "loss/advantage": Mean(advantage),
            "policy/ratio": Mean(terms.ratio),
            "policy/clip_fraction": Mean(terms.clipped),
            "policy/mean_logp": Mean(s.mean(s.logp)),
            "policy/max_abs_log_ratio": Max(s.sum(log_ratio).abs()),
            **tis_metrics,
            **mismatch_metrics(s),
        }
        loss = tis_weight * terms.loss
        return LossOutput(loss.sum(), len(advantage), metrics)
