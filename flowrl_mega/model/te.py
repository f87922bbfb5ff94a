"""Transformer Engine's layers: Megatron's spec for them, with its attention over our packed rows.

Not run on a GPU yet.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from megatron.core.extensions import transformer_engine as megatron_te
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_with_transformer_engine_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from flowrl_mega.model.layers import PackedAttention, PackedRows


class PackedFormat:
    """Put before a class with TEDotProductAttention's forward: packed rows in format sbhd become its format thd.

    Megatron's own attention stays in sbhd, where each row is rotated by its own angle; in thd it would rotate sequence
    by sequence, from 0, with a host synchronisation each.
    """

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [T, 1, h, d], key and value [T, 1, h_kv, d] -> [T, 1, h * d]."""
        rows = [x.squeeze(1) for x in (query, key, value)]
        kwargs["packed_seq_params"] = thd(kwargs["packed_seq_params"])
        output = super().forward(*rows, *args, **kwargs)  # type: ignore[misc]
        return output.reshape(query.shape[0], 1, -1)


def thd(rows: PackedRows) -> PackedSeqParams:
    """The same sequences, as Transformer Engine's attention wants them described; our own fields left out."""
    values = {field.name: getattr(rows, field.name) for field in fields(PackedSeqParams)}
    return PackedSeqParams(**{**values, "qkv_format": "thd"})


def te_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's spec for Transformer Engine with packed attention.

    Its flash and cuDNN kernels are for half precision; what it has for fp32 holds all scores of a batch in memory, so
    fp32 keeps our own attention.
    """
    layer = get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)
    attention: Any = PackedAttention
    if config.params_dtype != torch.float32:
        attention = type("TEPackedAttention", (PackedFormat, megatron_te.TEDotProductAttention), {})
    layer.submodules.self_attention.submodules.core_attention = ModuleSpec(module=attention)
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=megatron_te.TENorm)
