"""GFlowRL: flow balance with the group's own log Z, a clipped gap, and a weight without a floor.

Source: "GFlowRL", arXiv 2607.13394, Eq. 4 and 6-8, read in secondary copies; where those leave a choice, it is named
here. With r the raw reward, pi_old the policy that wrote the answers, Z and g without gradient:

    Z = mean over the group of beta r + (1/|y|) log(pi_ref / pi_old)(y|x)
    g = Z + (1/|y|) log(pi_old / pi_ref)(y|x) - beta r
    L = mean over sequences of w (clip(g, -eps, eps_high) + (1/|y|) log(pi_theta / pi_old)(y|x))^2
    w = min(pi_theta / pi_old (y|x), 1 + eps_high), detached

That is FlowRL with `z: group`, `clip_gap` and `weight: cap`, and its target, pi_ref e^{|y| (beta r - c)}, whatever the
group's size, the clip and the staleness. Eq. 4 as printed leaves the 1/|y| of Z out: `z_as_printed`, another target.
"""

from __future__ import annotations

from typing import Literal

from pydantic import Field
from torch import Tensor

from flowrl_mega.config import LogZKind
from flowrl_mega.objectives.flowrl import FlowBalance, Weight
from flowrl_mega.objectives.inputs import LossInputs


class GFlowRL(FlowBalance):
    """Settings of GFlowRL; the defaults are the paper's, but for 1/|y| in Z."""

    name: Literal["gflowrl"] = "gflowrl"
    beta: float = Field(8.0, ge=0, allow_inf_nan=False, description="inverse temperature; short answers want less")
    weight: Weight = Field("cap", description="w: the ratio, at most 1 + eps_high; or another of FlowRL's")
    clip_gap: bool = Field(True, description="what pi_old leaves of the residual is kept in [-eps, eps_high]")
    z_as_printed: bool = Field(
        False, description="Z without 1/|y|, as Eq. 4 is printed: long answers are then pushed off the reference"
    )

    @property
    def log_z_kind(self) -> LogZKind:
        return "group"

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The raw reward [N]: r_hat would move the target."""
        return rewards.double()

    def _own_estimate(self, s: LossInputs, logp: Tensor) -> Tensor:
        if not self.z_as_printed:
            return super()._own_estimate(s, logp)
        return self.beta * s.credit.double() - (s.sum(logp) - s.sum(self.ref_logp(s)))
