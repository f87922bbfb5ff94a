"""REINFORCE++: the clipped policy gradient with the reward to go, normalised over the whole step instead of a group.

Source: "REINFORCE++", arXiv 2501.03262, Eq. 8-10:

    A_t = r(x, y) - kl_coef sum_{i >= t} log(pi_old(y_i) / pi_ref(y_i)),  made mean 0, variance 1 over the step's tokens
    L   = mean over tokens of -min(rho_t A_t, clip(rho_t, 1 - eps, 1 + eps_high) A_t)

`baseline: group` takes the mean reward of the prompt's answers off first, as "REINFORCE++-baseline" does.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from flowrl_mega.objectives.base import LossOutput, SumOverReplicas, group_normalise
from flowrl_mega.objectives.gae import gae
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.objectives.policy_gradient import TokenPolicyGradient, normalise_over_tokens


class ReinforcePP(TokenPolicyGradient):
    """Settings of REINFORCE++; kl_coef counts in the reward."""

    name: Literal["reinforce_pp"] = "reinforce_pp"
    baseline: Literal["none", "group"] = Field("none", description="taken off the reward: nothing, or its group's mean")

    @property
    def kl_in_reward(self) -> bool:
        return self.kl_coef > 0

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """The reward [N], with `baseline: group` less its group's mean."""
        return group_normalise(rewards, group, divide=False) if self.baseline == "group" else rewards.double()

    @torch.no_grad()
    def prepare(
        self, batches: list[LossInputs], sum_over_replicas: SumOverReplicas, groups: int
    ) -> list[dict[str, Tensor]]:
        """Advantages, "advantage" [T]."""
        to_go = []
        for s in batches:
            reward = self.token_rewards(s)
            to_go.append(gae(reward, torch.zeros_like(reward), s.cu_seqlens, gamma=1.0, lam=1.0))
        return [{"advantage": advantage} for advantage in normalise_over_tokens(to_go, sum_over_replicas)]

    def loss(self, s: LossInputs) -> LossOutput:
        return self.surrogate_loss(s, s.prepared["advantage"], kl_in_loss=False)
