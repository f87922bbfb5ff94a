"""Names and shards: Megatron's parameters of one rank <-> whole tensors under Hugging Face names.

Three layouts of one tensor:
  shard  what this tensor-parallel rank's parameter holds
  whole  Megatron's parameter at tp = 1: qkv by query group [q heads of the group; k; v], fc1 [gate; up]
  named  Hugging Face tensors, one `whole` to one, two or three names
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import safe_open
from torch import Tensor

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.policy import Policy

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "input_layernorm.weight": ("input_layernorm.weight",),
    "self_attention.linear_qkv.weight": tuple(f"self_attn.{x}_proj.weight" for x in "qkv"),
    "self_attention.linear_qkv.bias": tuple(f"self_attn.{x}_proj.bias" for x in "qkv"),
    "self_attention.linear_proj.weight": ("self_attn.o_proj.weight",),
    "self_attention.q_layernorm.weight": ("self_attn.q_norm.weight",),
    "self_attention.k_layernorm.weight": ("self_attn.k_norm.weight",),
    "pre_mlp_layernorm.weight": ("post_attention_layernorm.weight",),
    "mlp.linear_fc1.weight": ("mlp.gate_proj.weight", "mlp.up_proj.weight"),
    "mlp.linear_fc2.weight": ("mlp.down_proj.weight",),
}
_COLUMN = ("word_embeddings.weight", "output_layer.weight", "linear_qkv.weight", "linear_qkv.bias", "linear_fc1.weight")
_ROW = ("linear_proj.weight", "linear_fc2.weight")


def hf_names(name: str) -> tuple[str, ...]:
    """Hugging Face names of the Megatron parameter `name` (as GPTModel calls it)."""
    if name in _TOP:
        return (_TOP[name],)
    match = re.fullmatch(r"decoder\.layers\.(\d+)\.(.+)", name)
    assert match, f"unknown parameter {name}"
    return tuple(f"model.layers.{match[1]}.{part}" for part in _LAYER[match[2]])


def to_whole(name: str, parts: list[Tensor], arch: Architecture) -> Tensor:
    """The Megatron tensor of these Hugging Face tensors, given in the order of `hf_names`."""
    if "linear_qkv" not in name:
        return torch.cat(parts) if len(parts) > 1 else parts[0]
    groups, tail = arch.kv_heads, parts[0].shape[1:]
    return torch.cat([part.reshape(groups, -1, *tail) for part in parts], dim=1).reshape(-1, *tail)


def to_named(name: str, whole: Tensor, arch: Architecture) -> list[Tensor]:
    """The inverse of `to_whole`."""
    if "linear_fc1" in name:
        return list(whole.chunk(2))
    if "linear_qkv" not in name:
        return [whole[: arch.vocab] if "word_embeddings" in name or "output_layer" in name else whole]
    tail = whole.shape[1:]
    by_group = whole.reshape(arch.kv_heads, -1, *tail)
    sizes = [arch.heads // arch.kv_heads * arch.head_dim, arch.head_dim, arch.head_dim]
    return [part.reshape(-1, *tail) for part in by_group.split(sizes, dim=1)]


def to_shard(name: str, whole: Tensor, tp: int, rank: int) -> Tensor:
    """The slice of `whole` that tensor-parallel rank `rank` of `tp` holds."""
    if name.endswith(_ROW):
        return whole.chunk(tp, dim=1)[rank]
    if "linear_fc1" in name:
        return torch.cat([half.chunk(tp)[rank] for half in whole.chunk(2)])
    if name.endswith(_COLUMN):
        padding = -whole.shape[0] % tp
        if padding:
            whole = torch.cat([whole, whole.new_zeros(padding, *whole.shape[1:])])
        return whole.chunk(tp)[rank]
    return whole


def from_shards(name: str, shards: list[Tensor]) -> Tensor:
    """The inverse of `to_shard`, but that padded vocabulary rows stay."""
    if len(shards) == 1 or not name.endswith(_ROW + _COLUMN):
        return shards[0]
    if name.endswith(_ROW):
        return torch.cat(shards, dim=1)
    if "linear_fc1" in name:
        return torch.cat([half for pair in zip(*(s.chunk(2) for s in shards), strict=True) for half in pair])
    return torch.cat(shards)


@torch.no_grad()
def load_hf(policy: Policy, path: str | Path) -> None:
    """Fill the policy's shards from the safetensors of a Hugging Face folder, tensor by tensor."""
    read, known = _reader(Path(path))
    layout = policy.layout
    for name, parameter in policy.gpt.named_parameters():
        names = hf_names(name)
        missing = [n for n in names if n not in known]
        if missing:
            raise ConfigError(f"{path}: holds no tensor {missing[0]!r}; the folder is incomplete or of another model")
        known.difference_update(names)
        shard = to_shard(name, to_whole(name, [read(n) for n in names], policy.arch), layout.tp, layout.tp_rank)
        if shard.shape != parameter.shape:
            shapes = f"{tuple(shard.shape)} instead of {tuple(parameter.shape)}"
            raise ConfigError(f"{path}: {names[0]!r} gives a shard of {shapes}; config.json is of another model")
        parameter.copy_(shard)
    known.discard("lm_head.weight" if policy.arch.tied else "")
    if unexpected := sorted(n for n in known if not n.endswith("rotary_emb.inv_freq")):
        raise ConfigError(f"{path}: unexpected tensor {unexpected[0]!r}; the policy has no place for it")


def check_hf(path: str | Path) -> None:
    """Refuse a folder without readable safetensors, before any rank starts."""
    _reader(Path(path))


def _reader(path: Path) -> tuple[Callable[[str], Tensor], set[str]]:
    """A function from tensor name to tensor, and the names there are."""
    files = sorted(path.glob("*.safetensors"))
    if not files:
        raise ConfigError(f"model.path = {str(path)!r}: holds no *.safetensors; give a Hugging Face model folder")
    try:
        opened = [safe_open(file, framework="pt") for file in files]
    except Exception as error:  # the Rust reader has an exception class of its own
        raise ConfigError(f"{path}: a safetensors file is broken ({error}); get the model folder again") from None
    place = {name: file for file in opened for name in file.keys()}
    return lambda name: place[name].get_tensor(name), set(place)


class WholeWeights:
    """The policy's weights as `whole` tensors on every rank, in buffers that are filled again at each `gather`.

    At tp = 1 they are the parameters themselves. Else all shards travel in one flat all-gather.
    """

    def __init__(self, policy: Policy) -> None:
        self.policy = policy
        self.tensors: dict[str, Tensor] = {}

    @torch.no_grad()
    def gather(self) -> dict[str, Tensor]:
        parameters = dict(self.policy.gpt.named_parameters())
        layout = self.policy.layout
        if layout.tp == 1:
            self.tensors = {name: p.detach() for name, p in parameters.items()}
            return self.tensors
        flat = torch.cat([p.detach().reshape(-1) for p in parameters.values()])
        everyone = [torch.empty_like(flat) for _ in range(layout.tp)]
        dist.all_gather(everyone, flat, group=layout.tp_group)
        sizes = [p.numel() for p in parameters.values()]
        pieces = zip(*(rank.split(sizes) for rank in everyone), strict=True)
        self.tensors = {
            name: from_shards(name, [piece.view(p.shape) for piece in shards])
            for (name, p), shards in zip(parameters.items(), pieces, strict=True)
        }
        return self.tensors


def named_tensors(policy: Policy) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and tensors of the policy, on every rank; never the partition function."""
    for name, whole in WholeWeights(policy).gather().items():
        yield from zip(hf_names(name), to_named(name, whole, policy.arch), strict=True)
