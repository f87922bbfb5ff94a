"""The work of fp8_emulated.py: a model whose linear layers round as FP8 recipes do, its answers and their log-probs."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

QUESTIONS = [
    "What is 17 plus 26?", "Name three fruits.", "Write a short poem about rain.", "Explain why the sky is blue.",
    "Who wrote Hamlet?", "Give me a recipe for pancakes.",
]  # fmt: skip
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
Rounding = Callable[[Tensor], Tensor]


def per_tensor(kind: torch.dtype) -> Rounding:
    """One scale, which brings the largest value to the largest of the format."""

    def rounded(x: Tensor) -> Tensor:
        scale = x.abs().max() / torch.finfo(kind).max
        return (x / scale).to(kind).to(x.dtype) * scale

    return rounded


def per_block(x: Tensor) -> Tensor:
    """A scale, a power of 2, for each 128 values of a row."""
    blocks = F.pad(x, (0, -x.shape[-1] % 128)).unflatten(-1, (-1, 128))
    scale = (blocks.abs().amax(-1, keepdim=True) / torch.finfo(E4M3).max).clamp(min=1e-30).log2().ceil().exp2()
    return ((blocks / scale).to(E4M3).to(x.dtype) * scale).flatten(-2)[..., : x.shape[-1]]


WAYS: dict[str, tuple[Rounding, bool]] = {  # and whether the first and the last layer stay as they are
    "tensorwise": (per_tensor(E4M3), True),
    "tensorwise, all layers": (per_tensor(E4M3), False),
    "blockwise": (per_block, True),
    "tensorwise in e5m2": (per_tensor(E5M2), True),
}


def emulate(model: Any, rounding: Rounding, ends: bool) -> Any:
    """The model with the inputs and weights of its linear layers rounded."""
    model = copy.deepcopy(model)
    for layer in model.model.layers[1:-1] if ends else model.model.layers:
        for module in layer.modules():
            if isinstance(module, torch.nn.Linear):
                module.weight.data = rounding(module.weight.data.float()).to(module.weight.dtype)
                module.register_forward_pre_hook(lambda _, inputs: (rounding(inputs[0].float()).to(inputs[0].dtype),))
    return model


@torch.no_grad()
def answers(model: Any, tokenizer: Any, tokens: int) -> list[tuple[int, Tensor]]:
    """Length of the prompt, and the ids of prompt and answer."""
    torch.manual_seed(0)
    found = []
    for question in QUESTIONS:
        text = tokenizer.apply_chat_template(
            [{"role": "user", "content": question}], add_generation_prompt=True, tokenize=False
        )
        prompt = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        full = model.generate(
            prompt, do_sample=True, top_k=0, top_p=1.0, temperature=1.0, max_new_tokens=tokens,
            num_return_sequences=2, pad_token_id=tokenizer.eos_token_id,
        )  # fmt: skip
        for row in full:
            end = (row[prompt.shape[1] :] == tokenizer.eos_token_id).nonzero()
            found.append((prompt.shape[1], row[: prompt.shape[1] + int(end[0]) + 1] if len(end) else row))
    return found


@torch.no_grad()
def logp(model: Any, rows: list[tuple[int, Tensor]]) -> list[Tensor]:
    found = []
    for prompt, row in rows:
        logits = model(row[None]).logits[0, prompt - 1 : -1].float()
        found.append(logits.log_softmax(-1).gather(1, row[prompt:, None])[:, 0].double())
    return found


def measure(path: str, tokens: int) -> list[dict[str, Any]]:
    """One row per way of rounding; `tokens` is the most that an answer has."""
    exact = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    rows = answers(exact, AutoTokenizer.from_pretrained(path), tokens)
    exact_logp, bf16 = logp(exact, rows), exact.to(torch.bfloat16)
    scored = {"bf16": logp(bf16, rows)}
    scored |= {name: logp(emulate(bf16, *way), rows) for name, way in WAYS.items()}
    results = []
    for name, found in scored.items():
        base = "fp32" if name == "bf16" else "bf16"
        differences = [a - b for a, b in zip(found, exact_logp if name == "bf16" else scored["bf16"], strict=True)]
        row = {
            "way": name,
            "against": base,
            "abs_logp": float(torch.cat(differences).abs().mean()),
            "fp8_sum_logp_diff": sum(abs(float(d.sum())) for d in differences) / len(differences),
            "fp8_delta_diff": sum(abs(float(d.mean())) for d in differences) / len(differences),
        }
        results.append(row)
    return results
