"""Layers that megatron-core's local spec lacks: packed attention, rotary positions per sequence, RMSNorm under SP."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch import Tensor

from flowrl_mega.parallel.backends import apex_norm
from flowrl_mega.parallel.packing import Bucket, PackedBatch


@dataclass
class PackedRows(PackedSeqParams):
    """Megatron's description of a packed batch, with what our attention and rotary layers read.

    The format stays "sbhd" with batch size 1: Megatron's "thd" path loops over the sequences in every layer.
    """

    position_ids: Tensor | None = None
    buckets: list[Bucket] | None = None

    @staticmethod
    def of(batch: PackedBatch) -> PackedRows:
        return PackedRows(
            qkv_format="sbhd",
            cu_seqlens_q=batch.cu_seqlens,
            cu_seqlens_kv=batch.cu_seqlens,
            max_seqlen_q=batch.longest,
            max_seqlen_kv=batch.longest,
            position_ids=batch.position_ids,
            buckets=batch.buckets,
        )


class PackedAttention(torch.nn.Module):
    """Causal attention within each packed sequence, through torch's scaled_dot_product_attention.

    Sequences of like length share one padded view (`Bucket`): right padding under a causal mask needs no mask.
    """

    def __init__(self, config: Any, softmax_scale: float | None = None, **kwargs: Any) -> None:
        super().__init__()
        assert config.context_parallel_size == 1, "context parallelism needs Transformer Engine's attention"
        assert config.attention_dropout == 0.0
        self.scale = softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """query [T, 1, h, d], key and value [T, 1, h_kv, d] -> [T, 1, h * d]."""
        rows: PackedRows = kwargs["packed_seq_params"]
        assert rows.buckets is not None
        heads = [x.squeeze(1) for x in (query, key, value)]
        outputs = [self._attend(bucket, *(x[bucket.tokens] for x in heads)) for bucket in rows.buckets]
        output = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return output.reshape(query.shape[0], 1, -1)

    def _attend(self, bucket: Bucket, *heads: Tensor) -> Tensor:
        q, k, v = (_pad(x, bucket).transpose(1, 2) for x in heads)
        grouped = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale, enable_gqa=grouped)
        out = out.transpose(1, 2).reshape(-1, *out.shape[1::2])
        return out if bucket.scatter is None else out.index_select(0, bucket.scatter)


def _pad(x: Tensor, bucket: Bucket) -> Tensor:
    """[t, h, d] -> [sequences, longest, h, d]."""
    if bucket.scatter is not None:
        x = x.new_zeros(bucket.sequences * bucket.longest, *x.shape[1:]).index_copy(0, bucket.scatter, x)
    return x.view(bucket.sequences, bucket.longest, *x.shape[1:])


class PackedRotary(torch.nn.Module):
    """Angles [T, 1, 1, d] at each row's position in its own sequence; in GPTModel's place for `rotary_pos_emb`."""

    def __init__(self, inv_freq: Tensor) -> None:
        super().__init__()
        self.inv_freq: Tensor
        self.register_buffer("inv_freq", inv_freq, persistent=False)
        self.position_ids: Tensor | None = None

    def get_rotary_seq_len(self, context: Any, block: Any, states: Any, config: Any, rows: PackedRows) -> int:
        """Megatron asks for the length just before it calls forward: the one place that sees the packed batch."""
        self.position_ids = rows.position_ids
        return int(rows.max_seqlen_q or 0)

    def forward(self, length: int, **kwargs: Any) -> Tensor:
        assert self.position_ids is not None
        angles = self.position_ids[:, None].float() * self.inv_freq.to(self.position_ids.device)
        return torch.cat([angles, angles], -1)[:, None, None, :]


class RMSNorm(torch.nn.RMSNorm):
    """torch's RMSNorm with Megatron's constructor; marked so that SP sums its gradient over the TP ranks."""

    def __init__(self, config: Any, hidden_size: int, eps: float = 1e-6, **kwargs: Any) -> None:
        super().__init__(hidden_size, eps=eps, dtype=config.params_dtype)
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]


class ApexRMSNorm(RMSNorm):
    """The same on a GPU, in one of Apex's kernels. Not run yet."""

    def forward(self, x: Tensor) -> Tensor:
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine  # type: ignore[import-not-found]

        return fused_rms_norm_affine(x, self.weight, self.normalized_shape, self.eps)


def local_spec(config: Any, vp_stage: int | None = None) -> TransformerBlockSubmodules:
    """Megatron's own layer spec with the layers of this file put in; the layers of this pipeline stage."""
    norm = ApexRMSNorm if apex_norm().usable else RMSNorm
    layer = get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")
    parts = layer.submodules
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    attention = parts.self_attention.submodules
    attention.core_attention = ModuleSpec(module=PackedAttention)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    layers = [layer] * get_num_layers_to_build(config, vp_stage)
    return TransformerBlockSubmodules(layer_specs=layers, layer_norm=norm)
