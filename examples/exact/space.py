"""An answer space small enough to list: five tokens (the end and four letters) and answers of at most three, 85
outcomes a prompt, ended by the end token or cut at three letters.

Everything a run should reach is computed from transformers' own model in float64, so that neither our forward, our
losses nor our sampling take part in the oracle.
"""

from __future__ import annotations

import json
import zlib
from itertools import product
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END, LETTERS, MAX_TOKENS = 0, "abcd", 3
VOCAB = len(LETTERS) + 1  # odd: tp = 2 pads it, and the padded column must stay out of the softmax
# Not "a": positions only rotate queries and keys, so after a, aa and aaa every Llama predicts the same, and no training
# could reach a target that does not.
PROMPTS = ("ab", "bc", "dca")
RIGHT = 0.8  # an answer is right when its reward reaches this quantile of its prompt's 85 rewards: 17 are


def reward(row: dict[str, Any], response: str) -> float:
    """A fixed number in [0, 1) for each prompt and answer, without any pattern that a model could generalise."""
    return zlib.crc32(f"{row['prompt']}>{response}".encode()) / 2**32


def text(ids: list[int]) -> str:
    return "".join(LETTERS[i - 1] for i in ids if i != END)


def ids_of(letters: str) -> list[int]:
    return [LETTERS.index(letter) + 1 for letter in letters]


def outcomes() -> list[list[int]]:
    """Every answer that can be sampled, as token ids."""
    letters = range(1, VOCAB)
    ended = [[*stem, END] for n in range(MAX_TOKENS) for stem in product(letters, repeat=n)]
    return ended + [list(stem) for stem in product(letters, repeat=MAX_TOKENS)]


def lengths() -> Tensor:
    """|y| of every outcome, [outcomes] int64."""
    return torch.tensor([len(y) for y in outcomes()])


def rewards() -> Tensor:
    """[prompts, outcomes] float64."""
    return torch.tensor([[reward({"prompt": p}, text(y)) for y in outcomes()] for p in PROMPTS], dtype=torch.float64)


def write_task(folder: Path) -> Path:
    """The model folder `folder`/model (weights and tokenizer) and the prompts `folder`/prompts.jsonl.

    The weights are large enough for log-probs to be far from uniform, and the feed-forward layer is wide: a model too
    small for an arbitrary target would hide whether training aims at the right one.
    """
    config = LlamaConfig(
        vocab_size=VOCAB, hidden_size=48, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, initializer_range=0.2, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=END, pad_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.add_(0.3 * torch.randn_like(parameter))
    model.save_pretrained(folder / "model")
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<end>", *LETTERS])}, unk_token="<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(folder / "model")
    (folder / "prompts.jsonl").write_text("".join(json.dumps({"prompt": p}) + "\n" for p in PROMPTS))
    return folder


@torch.no_grad()
def reference_logp(folder: Path) -> Tensor:
    """log pi_ref of every outcome of every prompt, [prompts, outcomes] float64, by transformers."""
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float64)
    rows = []
    for prompt in map(ids_of, PROMPTS):
        # What stands behind an outcome's last token (the end, again and again) cannot change what comes before.
        answers = torch.tensor([[*y, *[END] * (MAX_TOKENS - len(y))] for y in outcomes()])
        tokens = torch.cat([torch.tensor(prompt).expand(len(answers), -1), answers], 1)
        logp = model(tokens).logits[:, len(prompt) - 1 : -1].log_softmax(-1).gather(2, answers[..., None])[..., 0]
        counted = torch.arange(MAX_TOKENS) < lengths()[:, None]
        rows.append((logp * counted).sum(1))
    return torch.stack(rows)
