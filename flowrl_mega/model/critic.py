"""The critic: V(x, y_<t), the reward that is expected of a prompt and the tokens so far."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowrl_mega.config import Config
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.stage import Model, Stage, whole_on_every_rank
from flowrl_mega.parallel.context import whole_response
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.packing import PackedBatch


class ValueHead(nn.Module):
    """Linear(H, 1), 0 at first: before it has learnt anything the critic expects nothing."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.zeros(1, hidden)), nn.Parameter(torch.zeros(1))

    def forward(self, hidden: Tensor) -> Tensor:
        """Hidden states [..., H] -> values [...] fp32, also where the weights are bf16, which is too coarse to regress
        on."""
        return nn.functional.linear(hidden.float(), self.weight.float(), self.bias.float())[..., 0]


class CriticStage(Stage):
    """A run of the critic's layers; the last one has the value head and no lm-head."""

    lm_head = False

    def __init__(self, arch: Architecture, config: Config, layout: Layout, vp_stage: int) -> None:
        super().__init__(arch, config, layout, vp_stage)
        self.value_head: ValueHead | None = None
        if self.post_process:
            self.value_head = ValueHead(arch.hidden).to(device=layout.device, dtype=self.config.params_dtype)
            whole_on_every_rank(self.value_head)

    def outputs(self, hidden: Tensor, head: Tensor | None, batch: PackedBatch, temperature: float) -> Tensor:
        """Values V(x, y_<t) of the R response tokens, [R] fp32: the row that predicts y_t has seen x and y_<t alone."""
        assert self.value_head is not None
        rows = self.computed_by_all(hidden)[batch.response_rows]
        return whole_response(self.value_head(rows), batch, self.layout.cp_group)


class Critic(Model):
    """A critic with a trunk of its own, in the policy's layout and layers, but not in FP8."""

    def __init__(self, arch: Architecture, config: Config, layout: Layout) -> None:
        model = config.model.model_copy(update={"fp8": "off", "fp8_params": False})
        config = config.model_copy(update={"model": model})
        super().__init__(arch, layout, [CriticStage(arch, config, layout, vp_stage) for vp_stage in range(layout.vpp)])
