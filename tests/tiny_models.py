"""Tiny random Hugging Face models, made with transformers, for comparison with ours."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.utils.logging import disable_progress_bar

from flowrl_mega.data.sums import ALPHABET
from flowrl_mega.data.tokenizer import char_tokenizer
from flowrl_mega.parallel.packing import Sequence

disable_progress_bar()

KINDS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM, {"tie_word_embeddings": True}),
    "llama-untied-rope": (
        LlamaConfig,
        LlamaForCausalLM,
        {
            "tie_word_embeddings": False,
            "rope_parameters": {
                "rope_type": "llama3", "rope_theta": 5e5, "factor": 8.0, "low_freq_factor": 1.0,
                "high_freq_factor": 4.0, "original_max_position_embeddings": 16,
            },
        },
    ),
    "mistral": (MistralConfig, MistralForCausalLM, {"tie_word_embeddings": False, "sliding_window": None}),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, {"tie_word_embeddings": False}),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, {"tie_word_embeddings": True, "head_dim": 16}),
}  # fmt: skip


def make(kind: str, folder: Path, vocab: int = 101, seed: int = 0, **changes: Any) -> Path:
    """Write a random model of this kind; the odd vocabulary makes tp = 2 pad it.

    The weights are large enough for attention and log-probs to be far from uniform. Twice as large, and the gradients
    that transformers itself computes in float32 and in float64 are 1e-5 apart.
    """
    config_class, model_class, special = KINDS[kind]
    size = dict(
        vocab_size=vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.15,
        bos_token_id=None, eos_token_id=1, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(seed)
    model = model_class(config_class(**{**size, **special, **changes}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("norm.weight", "bias")):
                parameter.add_(0.3 * torch.randn_like(parameter))  # ones and zeros would hide a swap
    model.save_pretrained(folder)
    char_tokenizer(ALPHABET).save_pretrained(folder)
    return folder


def in_float64(folder: Path) -> Any:
    """transformers' model in double precision, so that a difference to it is our own rounding.

    transformers computes its norms in float32 whatever the model's type is; here they are torch's.
    """
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64)
    for module in model.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = _rms_norm(module)
    return model


def _rms_norm(module: Any) -> Any:
    return lambda x: F.rms_norm(x, module.weight.shape, module.weight, module.variance_epsilon)


def response_logits(model: Any, prompt: list[int], response: list[int], temperature: float = 1.0) -> Tensor:
    """[response, V] logits that `model` gives one response, computed alone."""
    logits = model(torch.tensor([prompt + response])).logits[0]
    return logits[len(prompt) - 1 : -1] / temperature


def random_sequences(lengths: list[tuple[int, int]], vocab: int = 101, seed: int = 0) -> list[Sequence]:
    """Sequences of random tokens; `lengths` are of (prompt, response)."""
    generator = torch.Generator().manual_seed(seed)
    draw = [[torch.randint(vocab, (n,), generator=generator).tolist() for n in pair] for pair in lengths]
    return [Sequence(index, prompt, response) for index, (prompt, response) in enumerate(draw)]
