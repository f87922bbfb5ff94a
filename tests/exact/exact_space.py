"""An answer space small enough to list: the exact target of FlowRL, and the real trainer's policy measured against it.

Five tokens (the end and four letters) and answers of at most three: 85 outcomes a prompt, ended by the end token or cut
at three letters. Everything a run should reach is computed here from transformers' own model in float64, so that
neither our forward, our losses nor our sampling take part in the oracle.
"""

from __future__ import annotations

import json
import zlib
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import tiny_models
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

import flowrl_mega.parallel  # noqa: F401  # before megatron
from flowrl_mega.config import Config, validated
from flowrl_mega.evaluation.exact import sequence_logp
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.packing import Sequence, pack
from flowrl_mega.train import Trainer

END, LETTERS, MAX_TOKENS = 0, "abcd", 3
VOCAB = len(LETTERS) + 1  # odd: tp = 2 pads it, and the padded column must stay out of the softmax
# Not "a": positions only rotate queries and keys, so after a, aa and aaa every Llama predicts the same, and no training
# could reach a target that does not.
PROMPTS = ("ab", "bc", "dca")


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


def write_task(folder: Path) -> Path:
    """The model folder `folder`/model (weights and tokenizer) and the prompts `folder`/prompts.jsonl.

    The feed-forward layer is wide, since a model too small for an arbitrary target would hide whether training aims at
    the right one.
    """
    model = tiny_models.make(
        "llama", folder / "model", VOCAB, hidden_size=48, intermediate_size=256, initializer_range=0.2, eos_token_id=END
    )
    core = Tokenizer(models.WordLevel({token: i for i, token in enumerate(["<end>", *LETTERS])}, unk_token="<end>"))
    core.pre_tokenizer, core.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>").save_pretrained(model)
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


def lengths() -> Tensor:
    """|y| of every outcome, [outcomes] int64."""
    return torch.tensor([len(y) for y in outcomes()])


def rewards() -> Tensor:
    """[prompts, outcomes] float64."""
    return torch.tensor([[reward({"prompt": p}, text(y)) for y in outcomes()] for p in PROMPTS], dtype=torch.float64)


def target(ref_logp: Tensor, beta: float, length_norm: bool) -> tuple[Tensor, Tensor]:
    """(log pi* [prompts, outcomes], log Z [prompts]), the fixed point of the flow balance, by bisection.

    pi*(y) = pi_ref(y) exp(s (beta r - c)) with s = 1, or |y| with length normalisation; log Z = c is the number that
    makes the sum 1.
    """
    scale = lengths() if length_norm else torch.ones(len(outcomes()))
    low, high = (torch.full((len(PROMPTS), 1), sign * 50.0, dtype=torch.float64) for sign in (-1, 1))
    for _ in range(100):
        c = (low + high) / 2
        log_p = ref_logp + scale * (beta * rewards() - c)
        too_much = log_p.logsumexp(1, keepdim=True) > 0
        low, high = torch.where(too_much, c, low), torch.where(too_much, high, c)
    return log_p, c[:, 0]


@dataclass(frozen=True)
class Trained:
    """One run's end: log pi [prompts, outcomes] and log Z [prompts], both float64, and the lines of metrics.jsonl."""

    logp: Tensor
    log_z: Tensor | None
    metrics: list[dict[str, float]]

    def kl(self, log_p: Tensor) -> Tensor:
        """KL(pi || p) of every prompt, [prompts], nats."""
        return (self.logp.exp() * (self.logp - log_p)).sum(1)

    def inverse_temperature(self, ref_logp: Tensor, length_norm: bool) -> Tensor:
        """The slope of (log pi - log pi_ref) / s on the reward over the outcomes, drawn from pi: beta at the target.

        [prompts]; s is 1, or |y| with length normalisation. Sharper than a KL, which is quadratic in the error.
        """
        p = self.logp.exp()
        y = (self.logp - ref_logp) / (lengths() if length_norm else 1)
        r = rewards() - (p * rewards()).sum(1, keepdim=True)
        return (p * r * y).sum(1) / (p * r * r).sum(1)

    def expected_reward(self) -> float:
        """E[r], the mean over the prompts."""
        return float((self.logp.exp() * rewards()).sum(1).mean())


def train(folder: Path, name: str, steps: int, sections: dict[str, Any]) -> Trained:
    """Train on this rank (with the others), then read the policy off outcome by outcome. `steps` = 0: the start."""
    tree = {
        "run_dir": str(folder / name),
        "steps": max(1, steps),
        "model": {"path": str(folder / "model")},
        "parallel": {"tp": 2},
        "data": {"path": str(folder / "prompts.jsonl")},
        "reward": "exact_space:reward",
        "checkpoint": {"at_end": False},
        "monitor": {"progress": False},
        **sections,
    }
    config = validated(Config, tree, "")
    trainer = Trainer(config, layouts.init(config.parallel, config.seed))
    if steps:
        trainer.run()
    pairs = [(ids_of(prompt), y) for prompt in PROMPTS for y in outcomes()]
    sequences = [Sequence(i, prompt, y) for i, (prompt, y) in enumerate(pairs)]
    logp = sequence_logp(trainer.policy, sequences, 1.0, 16384).view(len(PROMPTS), -1)
    file = Path(config.run_dir) / "metrics.jsonl"
    lines = file.read_text().splitlines() if steps else []
    return Trained(logp, _log_z(trainer), [json.loads(line) for line in lines])


def _log_z(trainer: Trainer) -> Tensor | None:
    batch = pack([Sequence(i, ids_of(prompt), [END]) for i, prompt in enumerate(PROMPTS)])
    log_z = trainer.policy.score([batch])[0].log_z
    return None if log_z is None else torch.empty(len(PROMPTS)).index_copy(0, batch.index, log_z).double()
