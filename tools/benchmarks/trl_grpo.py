"""Time and memory of one GRPO step by TRL's GRPOTrainer on CPU: the yardstick for the same work by flowrl-mega.

    python -m venv TRL && TRL/bin/pip install -r requirements/trl.txt
    TRL/bin/python tools/benchmarks/trl_grpo.py --model DIR [--prompts 16 --answers 16 --tokens 64 --threads 2 ...]

A step is: generate prompts x answers x tokens (no answer ends early), reward, advantage, one update. Prints one line
of JSON.

How TRL is set up, and why, so that it is as fast as it can be here:
- float32 and no gradient checkpointing: the defaults (bf16, recomputation) save GPU memory and cost time on a CPU.
- beta 0: no reference model, no KL. One iteration and one update a batch: TRL then leaves out the forward pass of the
  old policy.
- all answers in one micro-batch; `--microbatch` splits the update (gradient accumulation) when a large vocabulary needs
  the memory; generation stays one batch.
- generation by transformers' generate(). The end token is suppressed (min_new_tokens), so that every answer has exactly
  --tokens tokens and the work is the same for both trainers.
- no logging, saving, evaluation or progress bar; a reward that costs nothing.
"""

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from importlib.metadata import version
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import distinct_letters, prompts

WARM_UP_STEPS = 2


class StepClock(TrainerCallback):
    """Seconds from the end of one step to the end of the next: all that the trainer does, not only its update."""

    def __init__(self) -> None:
        self.seconds: list[float] = []
        self.last = 0.0

    def on_train_begin(self, args, state, control, **kwargs):
        self.last = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.last)
        self.last = now


class Reward:
    """The workload's reward; remembers how many tokens the answers had."""

    __name__ = "distinct_letters"

    def __init__(self) -> None:
        self.token_counts: set[int] = set()

    def __call__(self, completions: list[str], completion_ids: list[list[int]], **_: object) -> list[float]:
        self.token_counts.update(len(ids) for ids in completion_ids)
        return [distinct_letters(text) for text in completions]


def settings(args: argparse.Namespace, folder: str) -> GRPOConfig:
    """The set-up that the module's docstring explains."""
    sequences = args.prompts * args.answers
    microbatch = args.microbatch or sequences
    if sequences % microbatch:
        raise SystemExit(f"--microbatch {microbatch} does not divide {sequences} sequences (--prompts x --answers)")
    return GRPOConfig(
        output_dir=folder,
        max_steps=WARM_UP_STEPS + args.steps,
        per_device_train_batch_size=microbatch,
        gradient_accumulation_steps=sequences // microbatch,
        steps_per_generation=sequences // microbatch,
        num_generations=args.answers,
        num_iterations=1,
        max_completion_length=args.tokens,
        generation_kwargs={"min_new_tokens": args.tokens},
        temperature=1.0,
        beta=0.0,
        learning_rate=1e-6,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        dataloader_pin_memory=False,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )


def measure(args: argparse.Namespace) -> dict[str, object]:
    """Train WARM_UP_STEPS + args.steps steps and return the record that is printed."""
    torch.set_num_threads(args.threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(args.model, padding_side="left")
    clock, reward = StepClock(), Reward()
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=model,
            processing_class=tokenizer,
            reward_funcs=reward,
            args=settings(args, folder),
            train_dataset=Dataset.from_dict({"prompt": prompts(args.prompts)}),
            callbacks=[clock],
        )
        trainer.train()
    assert reward.token_counts == {args.tokens}, f"answers of {sorted(reward.token_counts)} tokens, not {args.tokens}"
    timed = clock.seconds[WARM_UP_STEPS:]
    seconds = statistics.median(timed)
    return {
        "provider": "trl",
        "tokens_per_second": args.prompts * args.answers * args.tokens / seconds,
        "seconds_per_step": seconds,
        "step_seconds": [round(s, 4) for s in timed],
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,  # Linux counts in KiB
        "prompts": args.prompts,
        "answers": args.answers,
        "tokens": args.tokens,
        "prompt_tokens": statistics.mean(len(ids) for ids in tokenizer(prompts(args.prompts))["input_ids"]),
        "microbatch": args.microbatch or args.prompts * args.answers,
        "threads": args.threads,
        "versions": {name: version(name) for name in ("trl", "transformers", "accelerate", "torch")},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Time and memory of one GRPO step by TRL's GRPOTrainer on CPU.")
    parser.add_argument("--model", required=True, help="Hugging Face folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=16, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer")
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps, after {WARM_UP_STEPS} of warm-up")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--microbatch", type=int, help="sequences a forward-backward (default: all)")
    parser.add_argument("--json", type=Path, help="also write the line to this file")
    args = parser.parse_args()
    line = json.dumps(measure(args))
    print(line)
    if args.json:
        args.json.write_text(line + "\n")


if __name__ == "__main__":
    main()
