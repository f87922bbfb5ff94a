"""log Z(x), the learned log partition function of a prompt (FlowRL, Eq. 5 and appendix)."""

from __future__ import annotations

from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from flowrl_mega.config import LogZ
from flowrl_mega.parallel.packing import PackedBatch


class PartitionMLP(nn.Module):
    """[Linear(H, H) -> GELU -> LayerNorm -> Dropout] x 2 -> Linear(H, 1): 2 H^2 + 7 H + 1 parameters. The output IS
    log Z."""

    def __init__(self, hidden: int, seed: int, dropout: float = 0.0) -> None:
        super().__init__()
        self.seed, self.dropout = seed, dropout
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)  # the same weights on every rank and in every layout
            self.layers = nn.Sequential(
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden),
                nn.Linear(hidden, hidden), nn.GELU(), nn.LayerNorm(hidden),
                nn.Linear(hidden, 1),
            )  # fmt: skip

    def forward(self, prompt_mean: Tensor, batch: PackedBatch | None = None) -> Tensor:
        """[B, H], the mean of the last hidden states over the prompt's tokens -> log Z [B] fp32.

        Computed in fp32 also where the weights are bf16, as Megatron's optimizer wants them beside a bf16 model.
        Dropout is for forwards with gradient alone: what is scored is the model, not a sample of it.
        """
        hidden = prompt_mean.float()
        for block in (0, 1):
            hidden = _in_fp32(self.layers[3 * block : 3 * block + 3], hidden)
            if self.dropout and torch.is_grad_enabled() and batch is not None:
                hidden = hidden * self._mask(batch, hidden, block)
        return _in_fp32(self.layers[6:], hidden)[:, 0]

    def _mask(self, batch: PackedBatch, hidden: Tensor, block: int) -> Tensor:
        """[B, H], 0 or 1 / (1 - dropout). Depends on a sequence's position in its step alone: the same on every
        rank that computes it, in every layout, and after a resumption."""
        drawn = [
            np.random.Generator(np.random.Philox(key=[self.seed, batch.step], counter=[0, block, position, 0])).random(
                hidden.shape[1], dtype=np.float32
            )
            for position in batch.index.tolist()
        ]
        kept = torch.from_numpy(np.stack(drawn)).to(hidden.device) >= self.dropout
        return kept / (1 - self.dropout)


def _in_fp32(layers: nn.Module, hidden: Tensor) -> Tensor:
    weights = {name: weight.float() for name, weight in layers.named_parameters()}
    return torch.func.functional_call(layers, weights, (hidden,))


class PartitionConstant(nn.Module):
    """One learned scalar for all prompts, 0 at first."""

    def __init__(self) -> None:
        super().__init__()
        self.value = nn.Parameter(torch.zeros(1))

    def forward(self, prompt_mean: Tensor, batch: PackedBatch | None = None) -> Tensor:
        return self.value.float().expand(prompt_mean.shape[0])


def build_partition(log_z: LogZ, hidden: int, seed: int) -> nn.Module | None:
    """The partition function of this kind; None where log Z is not learned."""
    if not log_z.learned:
        return None
    return PartitionConstant() if log_z.kind == "constant" else PartitionMLP(hidden, seed, log_z.dropout)


def prompt_mean_parts(batch: PackedBatch, hidden: Tensor, prompt: Literal["all", "drop-last"]) -> tuple[Tensor, Tensor]:
    """(sum of `hidden` [T, H] over each prompt's rows on this rank [B, H] fp32, the prompt's number of tokens [B]).

    drop-last leaves out a prompt's last token, unless it is the only one.
    """
    rows, segment, lengths = batch.prompt_rows, batch.prompt_segment, batch.prompt_lengths
    if prompt == "drop-last":
        kept = (batch.position_ids[rows] < lengths[segment] - 1) | (lengths[segment] == 1)
        rows, segment, lengths = rows[kept], segment[kept], (lengths - 1).clamp(min=1)
    return prompt_sum(hidden, rows, segment, batch.size), lengths


def prompt_sum(hidden: Tensor, rows: Tensor, segment: Tensor, prompts: int) -> Tensor:
    """Sum of `hidden` [T, H] over each prompt's rows -> [B, H] fp32."""
    total = hidden.new_zeros(prompts, hidden.shape[1], dtype=torch.float32)
    return total.index_add(0, segment, hidden[rows].float())
