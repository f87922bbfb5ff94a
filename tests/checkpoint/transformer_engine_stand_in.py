"""Megatron's layer spec for Transformer Engine, with stand-ins for its layers: it needs CUDA even to be imported.

The spec is Megatron's own (`get_gpt_layer_with_transformer_engine_spec`); only the classes that it asks its "backend"
for come from here. Of the real ones they have what a checkpoint sees: names, shapes, sharding axes, extra states.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.backends import LocalSpecProvider
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from torch import Tensor


class NormAndLinear(ColumnParallelLinear):
    """In place of TELayerNormColumnParallelLinear (megatron/core/extensions/transformer_engine.py), which is a
    te.pytorch.LayerNormLinear: the norm before the linear layer is its parameter `layer_norm_weight`.

    Its `sharded_state_dict` cuts {"weight": 0, "bias": 0} and nothing else, as the one that is inherited here does: so
    every tensor-parallel rank holds all of `layer_norm_weight`.
    """

    def __init__(self, input_size: int, output_size: int, *, config: Any, **kwargs: Any) -> None:
        super().__init__(input_size, output_size, config=config, **kwargs)
        self.layer_norm_weight = torch.nn.Parameter(torch.ones(input_size, dtype=config.params_dtype))

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        normed = F.rms_norm(x, self.layer_norm_weight.shape, self.layer_norm_weight, self.config.layernorm_epsilon)
        return super().forward(normed, *args, **kwargs)


class Norm(torch.nn.RMSNorm):
    """In place of TENorm, which makes a te.pytorch.RMSNorm. That is one of Transformer Engine's operations
    (transformer_engine/pytorch/ops/op.py, BasicOperation), all of which have an extra state: a norm's is empty bytes.
    """

    def __init__(self, config: Any, hidden_size: int, eps: float, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps)

    def get_extra_state(self) -> Tensor:
        return torch.empty(0, dtype=torch.uint8)

    def set_extra_state(self, state: Tensor | None) -> None:
        assert state is None or state.numel() == 0


class Backend(LocalSpecProvider):
    """In place of TESpecProvider (megatron/core/extensions/transformer_engine_spec_provider.py)."""

    def fuse_layernorm_and_linear(self) -> bool:
        return True

    def column_parallel_layer_norm_linear(self) -> type:
        return NormAndLinear

    def layer_norm(self, **kwargs: Any) -> type:  # type: ignore[override]
        return Norm


def fused_block_spec(config: Any) -> TransformerBlockSubmodules:
    original, gpt_layer_specs.TESpecProvider = gpt_layer_specs.TESpecProvider, Backend
    try:
        layer = gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    finally:
        gpt_layer_specs.TESpecProvider = original
    stage = gpt_layer_specs.get_num_layers_to_build(config)
    return TransformerBlockSubmodules(layer_specs=[layer] * stage, layer_norm=Norm)
