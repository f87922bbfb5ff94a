"""FlowRL: trajectory balance against the reward distribution pi_ref e^{beta r} / Z.

Source: "FlowRL: Matching Reward Distributions for LLM Reasoning", arXiv 2509.15207, Eq. 6-7:

    delta = log Z_phi(x) + (1/|y|) log pi_theta(y|x) - beta r_hat - (1/|y|) log pi_ref(y|x)
    w     = clip(pi_theta(y|x) / pi_old(y|x), 1 - eps, 1 + eps), detached
    L     = mean over sequences of w delta^2
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from pydantic import Field
from torch import Tensor

from flowrl_mega.objectives.common import LogZ, LossOutput, Objective, Sequences, group_normalise, mismatch_metrics

Weight = Literal["paper", "max10", "none"]


class FlowTerms(NamedTuple):
    """The terms of the loss, each [B] float64."""

    loss: Tensor  # w delta^2, with gradient
    delta: Tensor  # the residual, with gradient
    weight: Tensor  # w, detached
    clipped: Tensor  # 1.0 where w is not the ratio pi_theta / pi_old itself, else 0.0


def trajectory_weight(sum_d: Tensor, weight: Weight, eps: float) -> tuple[Tensor, Tensor]:
    """w and where it was clipped, both [B] without gradient, from sum_d [B] = log pi_theta(y|x) - log pi_old(y|x).

    paper: clip(e^sum_d, 1 - eps, 1 + eps), Eq. 7.  max10: min(e^sum_d, 10), the authors' later release.  none: 1.
    """
    # Detached: with gradient, w would add delta^2 grad w, and the fixed point would no longer be the target.
    ratio = sum_d.detach().exp()
    if weight == "none":
        return torch.ones_like(ratio), torch.zeros_like(ratio)
    w = ratio.clamp(1 - eps, 1 + eps) if weight == "paper" else ratio.clamp(max=10.0)
    return w, (w != ratio).to(ratio.dtype)


def flowrl_loss(
    log_z: Tensor | float,
    sum_logp: Tensor,
    sum_ref_logp: Tensor,
    sum_d: Tensor,
    length: Tensor,
    credit: Tensor,
    *,
    beta: float,
    weight: Weight = "paper",
    eps: float = 0.2,
    length_norm: bool = True,
) -> FlowTerms:
    """FlowRL's loss per sequence (Eq. 6-7) from per-sequence sums, all [B]: delta^2 is not linear in the sums, so
    whoever splits a sequence over ranks adds its parts up first.

    log_z: log Z_phi(x), or 0.  sum_logp, sum_ref_logp: log pi_theta(y|x), log pi_ref(y|x).
    sum_d: sum over tokens of log pi_theta - log pi_old.  length: |y|.  credit: r_hat, or the raw reward.
    The residual uses token means (sums without length_norm); the weight always uses the token sum, the ratio of
    whole trajectories.
    """
    scale = length if length_norm else 1
    delta = log_z + sum_logp / scale - beta * credit - sum_ref_logp / scale
    w, clipped = trajectory_weight(sum_d, weight, eps)
    return FlowTerms(w * delta.square(), delta, w, clipped)


class FlowRL(Objective):
    """Settings of FlowRL; the defaults are the paper's."""

    name: Literal["flowrl"] = "flowrl"
    beta: float = Field(15.0, ge=0, allow_inf_nan=False, description="inverse temperature; short answers want less")
    z: LogZ = Field("mlp", description="log Z: of the prompt's hidden states, fixed at 0, or one learned scalar")
    weight: Weight = Field("paper", description="w: clipped to 1 +- eps, at most 10, or always 1")
    # The paper gives no eps; 0.2 is the clip_ratio of the released scripts.
    eps: float = Field(0.2, ge=0, lt=1, description="clip of the weight 'paper'")
    length_norm: bool = Field(True, description="token means in the residual; false: sums over the response")
    # w is the weight of a whole answer, and so is what multiplies it: L = mean of tis w delta^2.
    tis: Literal["none", "sum", "mean"] = Field(
        "none", description="weight pi_old / pi_rollout of the answer, or of its mean token"
    )
    reward_norm: Literal["group", "none"] = Field("group", description="credit: r_hat of the group, or the raw reward")

    @property
    def needs_reference(self) -> bool:
        return True

    @property
    def log_z(self) -> LogZ:
        return self.z

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """r_hat [N], or the raw reward: only the raw one has a target that stays put while the policy moves."""
        return group_normalise(rewards, group) if self.reward_norm == "group" else rewards.double()

    def loss(self, s: Sequences) -> LossOutput:
        assert s.ref_logp is not None, "FlowRL needs the reference's log-probs"
        assert (s.log_z is None) == (self.z == "zero"), f"z={self.z}, but log_z is {s.log_z}"
        log_z = torch.zeros_like(s.credit, dtype=torch.float64) if s.log_z is None else s.log_z.double()
        sum_logp, sum_ref_logp, sum_d = s.sum(s.logp), s.sum(s.ref_logp), s.sum(s.log_ratio())
        terms = flowrl_loss(
            log_z,
            sum_logp,
            sum_ref_logp,
            sum_d,
            s.length,
            s.credit.double(),
            beta=self.beta,
            weight=self.weight,
            eps=self.eps,
            length_norm=self.length_norm,
        )
        tis_weight, tis_metrics = self.tis_weight(s)
        metrics = {
            "residual": terms.delta,
            "delta_sq": terms.delta.square(),
            "weight": terms.weight,
            "clip_fraction": terms.clipped,
            "log_z": log_z,
            "mean_logp": sum_logp / s.length,
            "mean_logratio": (sum_logp - sum_ref_logp) / s.length,
            "max_abs_sum_d": sum_d.abs(),
            **tis_metrics,
            **mismatch_metrics(s),
        }
        if s.rollout_logp is not None:
            # delta with the engine's log-probs is delta - shift: what its drift alone does to the squared residual.
            shift = s.sum(s.mismatch()) / (s.length if self.length_norm else 1)
            metrics["mismatch_delta_sq"] = shift * (shift - 2 * terms.delta)
        loss = tis_weight * terms.loss
        return LossOutput(loss.sum(), len(s.credit), {k: v.detach() for k, v in metrics.items()})
