"""The checksums that SGLang's /weights_checker must report, computed from the tensors that were sent.

SGLang hashes its own tensors: q, k, v and gate, up are one each, every tensor-parallel rank has its slice, and the
vocabulary is padded. On CPU the hash is SHA-256, on CUDA its own of 32-bit words (`word_hash`).
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from itertools import groupby
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowrl_mega.model.architecture import Architecture
from flowrl_mega.rollout.sglang.quantize import SCALE

DTYPES = {"float32": torch.float32, "float": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FUSED = {"q_proj": "qkv_proj", "k_proj": "qkv_proj", "v_proj": "qkv_proj", "gate_proj": "gate_up_proj",
         "up_proj": "gate_up_proj"}  # fmt: skip
VOCAB_MULTIPLE = 64  # rows that SGLang pads the vocabulary to
FFN_MULTIPLE = 32  # what SGLang pads a rank's part of the feed-forward size to, on CPU


class Expected:
    """Digests of all tensors that a server of `tp` ranks with weights of `dtype` must hold, added bucket by bucket."""

    def __init__(self, arch: Architecture, tp: int, dtype: torch.dtype, cuda: bool) -> None:
        self.arch, self.tp, self.dtype = arch, tp, dtype
        self.digest = word_hash if cuda else sha_hash
        self.ffn_padding = 0 if cuda else -arch.ffn % (FFN_MULTIPLE * tp)
        self.ranks: list[dict[str, str]] = [{} for _ in range(tp)]
        self.quantized: set[str] = set()  # not compared: SGLang dequantizes them before hashing

    def add(self, named: list[tuple[str, Tensor]]) -> None:
        scaled = {name.removesuffix(SCALE) for name, _ in named if name.endswith(SCALE)}
        for fused, group in groupby(named, key=lambda pair: _server_name(pair[0])):
            parts = list(group)
            if parts[0][0].removesuffix(SCALE) in scaled:
                self.quantized.add(fused.removesuffix(SCALE))
                continue
            tensors = [tensor.to(self.dtype) for _, tensor in parts]
            for rank, digests in enumerate(self.ranks):
                digests[fused] = f"{self.digest(self._slice(fused, tensors, rank)):016x}"

    def difference(self, ranks: list[dict[str, Any]]) -> str:
        """How a server's tensors differ, in words; "" if they do not. `ranks`: from its weights_checker."""
        found = {entry["parallelism_info"][0]["tp_rank"]: entry["checksums"] for entry in ranks}
        if sorted(found) != list(range(self.tp)):
            return f"checksums of ranks {sorted(found)}, not of {self.tp}"
        lacking, wrong, extra = set(), set(), set()
        for rank, wanted in enumerate(self.ranks):
            lacking |= wanted.keys() - found[rank].keys()
            wrong |= {name for name, digest in wanted.items() if found[rank].get(name, digest) != digest}
            extra |= {n for n in found[rank].keys() - wanted.keys() - self.quantized if n.endswith(("weight", "bias"))}
        groups = {"lacks": lacking, "holds what the policy has not:": extra, "holds other values in": wrong}
        total = len(self.ranks[0])
        return "; ".join(
            f"{what} {_some(names)}, {len(names)} of {total} tensors" for what, names in groups.items() if names
        )

    def _slice(self, name: str, parts: list[Tensor], rank: int) -> Tensor:
        """The slice that a server's rank holds of the tensors `parts`, which it fuses under this name."""
        tp, kv_heads, kind = self.tp, self.arch.kv_heads, name.split(".")[-2]
        match kind:
            case "embed_tokens" | "lm_head":
                return _vocabulary_slice(parts[0], tp, rank)
            case "qkv_proj":
                query, *others = parts
                heads = min(tp, kv_heads)  # with more ranks than heads, several ranks hold the same head
                held = [part.chunk(heads)[rank * heads // tp] for part in others]
                return torch.cat([query.chunk(tp)[rank], *held])
            case "gate_up_proj":
                padded = [F.pad(part, (0, 0, 0, self.ffn_padding)) for part in parts]
                return torch.cat([part.chunk(tp)[rank] for part in padded])
            case "down_proj":
                return F.pad(parts[0], (0, self.ffn_padding)).chunk(tp, dim=1)[rank]
            case "o_proj":
                return parts[0].chunk(tp, dim=1)[rank]
            case _:
                return parts[0]


def _server_name(name: str) -> str:
    """SGLang's name of the tensor that contains the Hugging Face tensor `name`."""
    *front, module, kind = name.split(".")
    return ".".join([*front, FUSED.get(module, module), kind])


def _vocabulary_slice(whole: Tensor, tp: int, rank: int) -> Tensor:
    multiple = VOCAB_MULTIPLE
    if -(-whole.shape[0] // multiple) * multiple % tp:
        multiple *= tp
    rows = -(-whole.shape[0] // multiple) * multiple // tp
    part = whole[rank * rows : (rank + 1) * rows]
    return torch.cat([part, part.new_zeros(rows - part.shape[0], *part.shape[1:])])


def _some(names: set[str]) -> str:
    shown = sorted(names)[:3]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


def sha_hash(tensor: Tensor) -> int:
    """The first 8 bytes of the SHA-256 of the tensor's bytes."""
    digest = hashlib.sha256(_bytes(tensor).cpu().numpy().data).digest()
    return int.from_bytes(digest[:8], "big")


# SGLang's hash of CUDA tensors (sglang.kernels.ops.memory.gpu_tensor_hash) in integers of 64 bits: tiles of 8192 words,
# each word mixed with its index under two seeds, a tile's two sums one number, and the sum of those mixed once more.
M32, M64 = 2**32 - 1, 2**64 - 1
TILE, TILES_AT_ONCE = 8192, 64
SEEDS = (0x243F6A88, ((0x243F6A88 * 0x9E3779B1) ^ 0xDEADBEEF) & M32)
INDEX_MIXERS = ((0x27D4EB2D, 15), (0x165667B1, 13))


def word_hash(tensor: Tensor) -> int:
    """SGLang's hash of a tensor on CUDA."""
    raw = _bytes(tensor)
    if raw.numel() == 0:
        return 0
    if raw.numel() % 4:
        raw = torch.cat([raw, raw.new_zeros(-raw.numel() % 4)])
    words, total = raw.view(torch.int32), 0
    for first in range(0, words.numel(), TILE * TILES_AT_ONCE):
        total += sum(_tiles(words[first : first + TILE * TILES_AT_ONCE], first, words.numel()))
    return _mix64(total & M64)


def _tiles(words: Tensor, first: int, count: int) -> Iterator[int]:
    """One number per tile of `words`, which begin at word `first` of `count`."""
    index = torch.arange(first, first + words.numel(), device=words.device) & M32
    value = words.long() & M32
    halves = []
    for seed, (factor, turn) in zip(SEEDS, INDEX_MIXERS, strict=True):
        turned = ((index << turn) | (index >> (32 - turn))) & M32
        mixed = _mix32(value ^ ((index * factor + seed) & M32) ^ turned)
        padded = torch.nn.functional.pad(mixed, (0, -mixed.numel() % TILE))
        halves.append(_mix32((padded.view(-1, TILE).sum(1) & M32) ^ (count * 4 & M32)).tolist())
    return ((high << 32) + low for high, low in zip(*halves, strict=True))


def _mix32(x: Tensor) -> Tensor:
    """MurmurHash3's finalizer, of 32 bits each; int64 wraps around, of which the low 32 bits are right."""
    x = x ^ (x >> 16)
    x = (x * 0x85EBCA6B) & M32
    x = x ^ (x >> 13)
    x = (x * 0xC2B2AE35) & M32
    return x ^ (x >> 16)


def _mix64(x: int) -> int:
    """SplitMix64's finalizer."""
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & M64
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & M64
    return x ^ (x >> 31)
