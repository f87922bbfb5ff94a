"""log Z(x), the learned log partition function of a prompt (FlowRL, Eq. 5 and appendix)."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

Kind = Literal["mlp", "zero", "constant"]


class PartitionMLP(nn.Module):
    """[Linear(H, H) -> GELU -> LayerNorm] x 2 -> Linear(H, 1): 2 H^2 + 7 H + 1 parameters. The output IS log Z."""

    def __init__(self, hidden: int, seed: int) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same weights on every rank and in every layout
            self.layers = nn.Sequential(
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden),
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden),
                nn.Linear(hidden, 1),
            )  # fmt: skip

    def forward(self, prompt_mean: Tensor) -> Tensor:
        """[B, H], the mean of the last hidden states over the prompt's tokens -> log Z [B] fp32.

        Computed in fp32 also where the weights are bf16, as Megatron's optimizer wants them beside a bf16 model.
        """
        weights = {name: weight.float() for name, weight in self.layers.named_parameters()}
        return torch.func.functional_call(self.layers, weights, (prompt_mean.float(),))[:, 0]


class PartitionConstant(nn.Module):
    """One learned scalar for all prompts, 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, prompt_mean: Tensor) -> Tensor:
        return self.value.float().expand(prompt_mean.shape[0])


def build_partition(kind: Kind | None, hidden: int, seed: int) -> nn.Module | None:
    """The partition function of this kind; None where log Z is 0 or the objective has none."""
    if kind == "mlp":
        return PartitionMLP(hidden, seed)
    if kind == "constant":
        return PartitionConstant()
    assert kind in (None, "zero"), kind
    return None


def prompt_sum(hidden: Tensor, rows: Tensor, segment: Tensor, prompts: int) -> Tensor:
    """Sum of `hidden` [T, H] over each prompt's rows -> [B, H] fp32."""
    total = hidden.new_zeros(prompts, hidden.shape[1], dtype=torch.float32)
    return total.index_add(0, segment, hidden[rows].float())
