"""A random Qwen2 of a wanted size, and whether two folders hold the same bits."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from transformers import Qwen2Config, Qwen2ForCausalLM
from transformers.utils.logging import disable_progress_bar

disable_progress_bar()

VOCAB = 32768
HIDDEN = (2048, 1024, 512, 256)  # the largest whose two embeddings leave a quarter of the bytes for layers


def make(folder: Path, size: int, shard: int) -> None:
    """About `size` bytes in bf16, in files of at most `shard` bytes (or one tensor)."""
    with torch.device("meta"):
        model = Qwen2ForCausalLM(_config(size)).to(torch.bfloat16)
    model.to_empty(device="cpu")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.02, generator=generator)
    model.save_pretrained(folder, max_shard_size=shard)


def _config(size: int) -> Qwen2Config:
    parameters = size // torch.bfloat16.itemsize
    hidden = next((h for h in HIDDEN if 2 * VOCAB * h <= 0.75 * parameters), HIDDEN[-1])
    ffn, kv_heads, heads, head_dim = 11 * hidden // 4, hidden // 256, hidden // 64, 64
    layer = hidden * (2 * hidden + 2 * kv_heads * head_dim + 3 * ffn)
    return Qwen2Config(
        vocab_size=VOCAB,
        hidden_size=hidden,
        intermediate_size=ffn,
        num_hidden_layers=max(1, round((parameters - 2 * VOCAB * hidden) / layer)),
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=False,
    )


def weight_files(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.safetensors"))


def difference(wanted: Path, found: Path) -> str | None:
    """What two model folders do not have in common, bit by bit; None where that is nothing."""
    files = [file.name for file in weight_files(wanted)]
    if files != [file.name for file in weight_files(found)]:
        return "the names of the files"
    for name in files:
        with safe_open(wanted / name, "pt") as left, safe_open(found / name, "pt") as right:
            if set(left.keys()) != set(right.keys()):
                return f"{name}: the names of its tensors"
            for key in left.keys():
                if not _same(left.get_tensor(key), right.get_tensor(key)):
                    return f"{name}: {key}"
    return None


def _same(left: torch.Tensor, right: torch.Tensor) -> bool:
    if (left.dtype, left.shape) != (right.dtype, right.shape):
        return False
    return torch.equal(left.view(torch.uint8), right.view(torch.uint8))  # as bits: 0.0 equals -0.0
