"""Advantages of tokens from rewards and values of tokens, over packed sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl_mega.objectives.common import Sequences


def gae(reward: Tensor, value: Tensor, cu_seqlens: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantage estimates, [T] float64, of rewards r [T] and values V [T] in sequences of cu_seqlens.

        delta_t = r_t + gamma V_{t+1} - V_t        A_t = delta_t + gamma lam A_{t+1}

    V after the last token is 0: the answer has ended. With V = 0 and lam = 1 it is the (discounted) reward to go.
    Source: "High-Dimensional Continuous Control Using Generalized Advantage Estimation", arXiv 1506.02438, Eq. 16.
    """
    reward, value = reward.double(), value.double()
    lengths, ends = cu_seqlens.diff(), cu_seqlens[1:]
    advantage = torch.zeros_like(value)
    following = value.new_zeros(2, lengths.numel())  # V and A of the token after, by sequence
    # From the ends of all sequences backwards, all at once: the longest one says how many rounds.
    for back in range(1, int(lengths.max()) + 1):
        rows = (lengths >= back).nonzero()[:, 0]
        place = ends[rows] - back
        next_value, next_advantage = following[:, rows]
        now = reward[place] + gamma * next_value - value[place] + gamma * lam * next_advantage
        advantage[place] = now
        following[0, rows], following[1, rows] = value[place], now
    return advantage


def token_rewards(s: Sequences, penalty: Tensor | None) -> Tensor:
    """[T] float64: the answer's credit at its last token, less a penalty [T] at each."""
    reward = torch.zeros(s.logp.numel(), dtype=torch.float64, device=s.logp.device)
    reward[s.cu_seqlens[1:] - 1] = s.credit.double()
    return reward if penalty is None else reward - penalty
