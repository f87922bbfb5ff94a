"""Per-token advantages from per-token rewards and values, over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor


def gae(reward: Tensor, value: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates, [T] float64, of rewards r [T] and values V [T] in sequences of cu_seqlens.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    V after the last token is 0: the answer has ended. With V = 0 and lam = 1 it is the (discounted) reward to go.
    Source: "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438, Eq. 16.
    """
    reward, value = reward.double(), value.double()
    lengths = cu_seqlens.diff()
    tokens = torch.arange(value.numel(), device=value.device)
    after = cu_seqlens[1:].repeat_interleave(lengths, output_size=value.numel()) - tokens - 1  # tokens to the end
    advantage = reward + gamma * value.roll(-1).masked_fill(after < 1, 0.0) - value
    # A_t = sum_l (gamma lam)^l delta_{t + l}, by a log-step scan: a round adds to each token the sum that is `reach`
    # tokens ahead (a roll, masked at the answer's end) and so doubles the terms in it. Answers of thousands of tokens
    # take a dozen rounds, where the recursion would take as many steps as there are tokens.
    reach, longest = 1, int(lengths.max())
    while reach < longest:
        advantage = advantage + (gamma * lam) ** reach * advantage.roll(-reach).masked_fill(after < reach, 0.0)
        reach *= 2
    return advantage
