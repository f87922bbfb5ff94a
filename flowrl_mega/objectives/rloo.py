"""RLOO with the KL in the reward: the policy gradient whose baseline is the mean of the prompt's other answers.

Source: "Back to Basics", arXiv 2402.14740, Eq. 4 and 8; the clip is PPO's:

    R_i = r(x, y_i) - kl_coef sum_t log(pi_old(y_t) / pi_ref(y_t))
    A_i = R_i - mean over j != i of R_j
    L   = mean over sequences of (1/|y|) sum_t -min(rho_t A, clip(rho_t, 1 - eps, 1 + eps_high) A)

With kl_coef = 1 / (beta |y|) its target is FlowRL's: R is the same for all answers there, and every advantage 0. It
needs no critic and no log Z, which makes it the baseline that flow balance has to beat.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from flowrl_mega.objectives.base import LossOutput, SumOverReplicas, group_sums
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.policy_gradient import KlEstimator, PolicyGradient, kl_estimate


class RLOO(PolicyGradient):
    """Settings of RLOO; kl_coef counts in the reward."""

    name: Literal["rloo"] = "rloo"
    kl_estimator: KlEstimator = Field("k1", description="of a token's KL: log-ratio, half its square, or unbiased >= 0")
    baseline: Literal["others", "group"] = Field("others", description="mean of the prompt's other answers, or of all")

    @property
    def needs_old_logp(self) -> bool:
        return self.kl_coef > 0

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The reward itself [N]: the baseline needs the KL, too."""
        return rewards.double()

    @torch.no_grad()
    def prepare(
        self, batches: list[LossInputs], sum_over_replicas: SumOverReplicas, groups: int
    ) -> list[dict[str, Tensor]]:
        """Advantages of answers, "advantage" [B]."""
        returns = [self._return(s) for s in batches]
        sums = group_sums(batches, returns, groups, sum_over_replicas)
        prepared = []
        for s, own in zip(batches, returns, strict=True):
            summed, count = sums[:, s.group]
            # An answer without others has no baseline: 0, as in a group of one elsewhere.
            others = (summed - own) / (count - 1).clamp(min=1)
            prepared.append({"advantage": own - (others if self.baseline == "others" else summed / count)})
        return prepared

    def _return(self, s: LossInputs) -> Tensor:
        """R [B]."""
        if self.kl_coef == 0:
            return s.credit.double()
        assert s.ref_logp is not None, "rloo with kl_coef > 0 needs the reference's log-probs"
        return s.credit.double() - self.kl_coef * s.sum(kl_estimate(s.old_logp, s.ref_logp, self.kl_estimator))

    def loss(self, s: LossInputs) -> LossOutput:
        return self.surrogate_loss(s, s.per_token(s.prepared["advantage"]), kl_in_loss=False)
