"""Tiny random Hugging Face models for conversion: one of each family that people convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import safetensors
import torch
from safetensors.torch import load_file
from tiny_models import make
from torch import Tensor
from transformers import AutoModelForCausalLM

_LLAMA3_ROPE = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,  # Megatron knows no other
}  # fmt: skip


def _rope(theta: float) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": theta}


MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama2": ("llama", {"num_attention_heads": 4, "tie_word_embeddings": False}),  # as many key-value heads
    "llama3": (
        "llama",
        {"tie_word_embeddings": False, "rope_parameters": _LLAMA3_ROPE, "max_position_embeddings": 16384},
    ),
    "smollm2": ("llama", {"tie_word_embeddings": True, "rope_parameters": _rope(1e5)}),
    "qwen2": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": _rope(1e6)}),
    "qwen2.5": ("qwen2", {"tie_word_embeddings": True, "rope_parameters": _rope(1e6)}),
    "r1-distill-qwen": ("qwen2", {"tie_word_embeddings": False, "rope_parameters": _rope(1e4)}),
    "qwen3": ("qwen3", {"tie_word_embeddings": True, "head_dim": 8}),  # hidden / heads is 4
    "mistral": ("mistral", {"tie_word_embeddings": False, "sliding_window": None}),
}
# What each is converted as where one type is enough, and how large a file may be: small enough for several files.
STORED = {
    "llama2": ("fp32", None), "llama3": ("bf16", "20KB"), "smollm2": ("bf16", None), "qwen2": ("fp32", "40KB"),
    "qwen2.5": ("bf16", None), "r1-distill-qwen": ("bf16", "20KB"), "qwen3": ("fp32", None), "mistral": ("bf16", None),
}  # fmt: skip
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def make_stored(name: str, folder: Path, dtype: str | None = None) -> Path:
    """Write the model `name`: 4 layers, heads that tp = 4 divides, and a vocabulary that tp = 2 and 4 must pad."""
    kind, changes = MODELS[name]
    stored_dtype, file_size = STORED[name]
    size = {"num_hidden_layers": 4, "num_attention_heads": 8, "num_key_value_heads": 4}
    make(kind, folder, **{**size, **changes})
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=DTYPES[dtype or stored_dtype])
    (folder / "model.safetensors").unlink()
    model.save_pretrained(folder, **({} if file_size is None else {"max_shard_size": file_size}))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def contents(folder: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """Type, shape and bytes of every tensor, by file and name. (Of tensors, 0 and -0 would be equal, and no NaN.)"""
    return {file.name: dict(safetensors.deserialize(file.read_bytes())) for file in folder.glob("*.safetensors")}


def require_same_weights(found: Path, wanted: Path) -> None:
    """The same tensors in the same files, and the same index of them."""
    ours, theirs = contents(found), contents(wanted)
    assert ours.keys() == theirs.keys()
    for file, tensors in theirs.items():
        assert ours[file].keys() == tensors.keys(), file
        different = [name for name, tensor in tensors.items() if ours[file][name] != tensor]
        assert not different, f"{file}: {different}"
    assert _index(found) == _index(wanted)


def _index(folder: Path) -> Any:
    file = folder / "model.safetensors.index.json"
    return json.loads(file.read_text())["weight_map"] if file.exists() else None
