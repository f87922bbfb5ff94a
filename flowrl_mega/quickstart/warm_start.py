"""The quick start's first model: a small Llama, trained here from scratch on right answers until it is half good."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

from flowrl_mega.config import Config, OptimizerSettings
from flowrl_mega.data import sums
from flowrl_mega.data.load_prompts import load_prompts
from flowrl_mega.data.tokenizer import char_tokenizer
from flowrl_mega.evaluation.exact import exact_metrics, right_answer_probabilities
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.policy import Policy, PolicyOutput
from flowrl_mega.model.weights import load_hf, named_tensors
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.optimizer import Optimizer, wrap
from flowrl_mega.parallel.packing import PackedBatch, Sequence, pack
from flowrl_mega.parallel.schedule import forward_backward

OPTIMIZER = OptimizerSettings(lr=3e-3, weight_decay=0.0, warmup_steps=20)
SEQUENCES, CHECK_EVERY, ENOUGH, MOST_STEPS = 128, 50, 0.35, 1200


def write_random_model(folder: Path, seed: int, max_tokens: int) -> None:
    """A Hugging Face folder with random weights (about 200 thousand) and the task's own character tokenizer."""
    tokenizer = char_tokenizer(sums.ALPHABET)
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=96, intermediate_size=256, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=max(64, 4 + max_tokens),
            tie_word_embeddings=True,
            bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=None,
        )
    )  # fmt: skip
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def warm_start(config: Config, layout: Layout) -> int:
    """Train on uniformly drawn right answers of the training prompts until the exact pass rate is `ENOUGH`.

    Collective. Writes the Hugging Face folder config.model.path; returns the number of steps.
    """
    folder = Path(config.model.path)
    if layout.rank == 0:
        write_random_model(folder, config.seed, config.rollout.max_tokens)
    dist.barrier()
    store, _, tokenizer, (stop,) = load_prompts(config)
    prompts = [prompt.token_ids for prompt in store]
    answers = [[[*tokenizer(a)["input_ids"], stop] for a in p.row["right_answers"]] for p in store]
    arch = read_architecture(folder)
    policy = Policy(arch, config, layout, log_z=None)
    load_hf(policy, folder)
    model = wrap(policy.stages)
    optimizer = Optimizer(model, OPTIMIZER, bf16=False, total_updates=MOST_STEPS)
    draw = random.Random(config.seed)
    step, passed = 0, 0.0
    while passed < ENOUGH and step < MOST_STEPS:
        chosen = [draw.randrange(len(prompts)) for _ in range(SEQUENCES)]
        sequences = [Sequence(i, prompts[c], draw.choice(answers[c])) for i, c in enumerate(chosen)]
        optimizer.zero_grad()
        batch = pack(sequences, device=layout.device)
        forward_backward(model, [batch], lambda stage, batch: stage(batch), _negative_log_likelihood)
        optimizer.step(loss_is_finite=True)
        step += 1
        if step % CHECK_EVERY == 0:
            passed = exact_metrics(right_answer_probabilities(policy, prompts, answers), k=64)["pass_rate"]
    _export(policy, folder)
    return step


def _negative_log_likelihood(output: PolicyOutput, batch: PackedBatch) -> tuple[torch.Tensor, int, None]:
    return -output.logp.sum(), batch.target.numel(), None


def _export(policy: Policy, folder: Path) -> None:
    """Put the trained weights into the Hugging Face folder."""
    tensors = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in named_tensors(policy)}
    if policy.layout.rank == 0:
        partial = folder / "model.safetensors.partial"
        save_file(tensors, partial, metadata={"format": "pt"})
        shutil.move(partial, folder / "model.safetensors")
    dist.barrier()
