"""One table of names per architecture: Hugging Face's tensors <-> Megatron's parameters, and how they are laid out.

Three layouts of one tensor:
  shard  what one tensor-parallel rank's parameter holds
  whole  Megatron's parameter at tp = 1: qkv by query group [q heads of the group; k; v], fc1 [gate; up]
  named  Hugging Face tensors, one `whole` to one, two or three names
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from flowrl_mega.model.architecture import Architecture

Kind = Literal["copy", "vocab", "columns", "qkv", "gate_up"]


class Row(NamedTuple):
    """A parameter: Megatron's name for it, Hugging Face's, and what tensor parallelism does to it."""

    local: str  # its name under Megatron's local layer spec
    hf: tuple[str, ...]
    kind: Kind = "copy"  # copy: every rank has all; vocab, qkv, gate_up: cut along axis 0; columns: along axis 1
    fused: str | None = None  # where Transformer Engine has another name: its linear layers hold the norm before them

    @property
    def key(self) -> str:
        """Its name in Megatron's checkpoints: Transformer Engine's, whatever the layer spec. So one serves both."""
        return self.fused or self.local


TOP = (
    Row("embedding.word_embeddings.weight", ("model.embed_tokens.weight",), "vocab"),
    Row("decoder.final_layernorm.weight", ("model.norm.weight",)),
    Row("output_layer.weight", ("lm_head.weight",), "vocab"),
)
LLAMA = (
    Row("input_layernorm.weight", ("input_layernorm.weight",), fused="self_attention.linear_qkv.layer_norm_weight"),
    Row("self_attention.linear_qkv.weight", tuple(f"self_attn.{x}_proj.weight" for x in "qkv"), "qkv"),
    Row("self_attention.linear_proj.weight", ("self_attn.o_proj.weight",), "columns"),
    Row("pre_mlp_layernorm.weight", ("post_attention_layernorm.weight",), fused="mlp.linear_fc1.layer_norm_weight"),
    Row("mlp.linear_fc1.weight", ("mlp.gate_proj.weight", "mlp.up_proj.weight"), "gate_up"),
    Row("mlp.linear_fc2.weight", ("mlp.down_proj.weight",), "columns"),
)
QWEN2 = (*LLAMA, Row("self_attention.linear_qkv.bias", tuple(f"self_attn.{x}_proj.bias" for x in "qkv"), "qkv"))
QWEN3 = (
    *LLAMA,
    Row("self_attention.q_layernorm.weight", ("self_attn.q_norm.weight",)),
    Row("self_attention.k_layernorm.weight", ("self_attn.k_norm.weight",)),
)
LAYERS = {"llama": LLAMA, "mistral": LLAMA, "qwen2": QWEN2, "qwen3": QWEN3}

_LAYER = re.compile(r"decoder\.layers\.(\d+)\.(.+)")
_LOCAL = {row.fused: row.local for row in LLAMA if row.fused}
_KINDS = {name: row.kind for rows in (TOP, *LAYERS.values()) for row in rows for name in (row.local, row.key)}


def hf_names(name: str, arch: Architecture) -> tuple[str, ...]:
    """Hugging Face names of the Megatron parameter `name`, as GPTModel calls it under either layer spec."""
    layer = _LAYER.fullmatch(name)
    rows, short = (LAYERS[arch.model_type], layer[2]) if layer else (TOP, name)
    row = next((r for r in rows if short in (r.local, r.key)), None)
    assert row, f"unknown parameter {name}"
    return tuple(f"model.layers.{layer[1]}.{part}" for part in row.hf) if layer else row.hf


def local_name(name: str) -> str:
    """The name under Megatron's local layer spec of the parameter `name`."""
    layer = _LAYER.fullmatch(name)
    return f"decoder.layers.{layer[1]}.{_LOCAL[layer[2]]}" if layer and layer[2] in _LOCAL else name


def kind_of(name: str) -> Kind:
    """How the parameter `name` is laid out; what is in no table (the partition function) every rank has whole."""
    layer = _LAYER.fullmatch(name)
    return _KINDS.get(layer[2] if layer else name, "copy")


class CheckpointSlot(NamedTuple):
    """Where a distributed checkpoint holds a Megatron parameter: all layers' lie in one tensor [layers, ...]."""

    key: str
    layer: int | None  # the index along that tensor's first axis; None outside the layers
    name: str
    hf: tuple[str, ...]


def checkpoint_slots(arch: Architecture) -> Iterator[CheckpointSlot]:
    """All parameters of the model, in the order in which files usually hold them."""
    head = [r for r in TOP if not (arch.tied and r.local == "output_layer.weight")]
    yield CheckpointSlot(head[0].key, None, head[0].local, head[0].hf)
    for layer in range(arch.layers):
        for row in LAYERS[arch.model_type]:
            name = f"decoder.layers.{layer}.{row.local}"
            yield CheckpointSlot(f"decoder.layers.{row.key}", layer, name, hf_names(name, arch))
    for row in head[1:]:
        yield CheckpointSlot(row.key, None, row.local, row.hf)


def hf_shapes(arch: Architecture) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of the Hugging Face model; a tied head is none."""
    hidden, q, kv = arch.hidden, arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim
    sizes: dict[str, tuple[int, ...]] = {
        "embed_tokens.weight": (arch.vocab, hidden),
        "lm_head.weight": (arch.vocab, hidden),
        "q_proj.weight": (q, hidden),
        "k_proj.weight": (kv, hidden),
        "v_proj.weight": (kv, hidden),
        "q_proj.bias": (q,),
        "k_proj.bias": (kv,),
        "v_proj.bias": (kv,),
        "q_norm.weight": (arch.head_dim,),
        "k_norm.weight": (arch.head_dim,),
        "o_proj.weight": (hidden, q),
        "gate_proj.weight": (arch.ffn, hidden),
        "up_proj.weight": (arch.ffn, hidden),
        "down_proj.weight": (hidden, arch.ffn),
    }
    names = [name for slot in checkpoint_slots(arch) for name in slot.hf]
    return {name: sizes.get(".".join(name.split(".")[-2:]), (hidden,)) for name in names}


def joined_shape(shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
    """The shape of the tensor that `to_whole` makes of tensors of these shapes, which differ along axis 0 only."""
    return (sum(shape[0] for shape in shapes), *shapes[0][1:])


def to_whole(name: str, parts: list[Tensor], arch: Architecture) -> Tensor:
    """The `whole` Megatron tensor of these Hugging Face tensors, given in the order of `hf_names`.

    q [heads * d, H], k and v [kv_heads * d, H] -> qkv [(heads + 2 * kv_heads) * d, H], each query group's q, k and v
    side by side (biases alike, without H); gate and up [F, H] each -> fc1 [2 F, H]; a single tensor stays as it is.
    """
    if kind_of(name) != "qkv":
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    groups, tail = arch.kv_heads, parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *tail) for part in parts], dim=1).reshape(-1, *tail)


def to_named(name: str, whole: Tensor, arch: Architecture) -> list[Tensor]:
    """The Hugging Face tensors of a `whole` one, in the order of `hf_names`: the inverse of `to_whole`. A vocabulary
    [V', H] that is padded to V' rows comes back as [V, H]."""
    match kind_of(name):
        case "vocab":
            return [whole[: arch.vocab]]
        case "gate_up":
            return list(whole.chunk(2))
        case "qkv":
            by_group = whole.reshape(arch.kv_heads, -1, *whole.shape[1:])
            sizes = [arch.heads // arch.kv_heads * arch.head_dim, arch.head_dim, arch.head_dim]
            return [part.reshape(-1, *whole.shape[1:]) for part in by_group.split(sizes, dim=1)]
        case _:
            return [whole]


def to_shard(name: str, whole: Tensor, tp: int, rank: int) -> Tensor:
    """The shard of `whole` that tensor-parallel rank `rank` of `tp` holds: 1 / tp of axis 0 (vocab, qkv, and of each
    half of gate_up) or of axis 1 (columns), or all of it (copy). The vocabulary is padded with rows of zeros first, to
    a multiple of tp."""
    match kind_of(name):
        case "columns":
            return whole.chunk(tp, dim=1)[rank]
        case "gate_up":
            return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
        case "qkv":
            return whole.chunk(tp)[rank]
        case "vocab":
            padding = -whole.shape[0] % tp
            if padding:
                whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
            return whole.chunk(tp)[rank]
        case _:
            return whole


def from_shards(name: str, shards: list[Tensor]) -> Tensor:
    """The `whole` tensor of all tensor-parallel ranks' shards, given by rank: the inverse of `to_shard`, except that
    the vocabulary's padding stays."""
    kind = kind_of(name)
    if len(shards) == 1 or kind == "copy":
        return shards[0]
    if kind == "columns":
        return torch.cat(shards, dim=1)
    if kind == "gate_up":
        return torch.cat([half for pair in zip(*(s.chunk(2) for s in shards), strict=True) for half in pair])
    return torch.cat(shards)
