"""The work of trl_grpo.py: TRL's GRPOTrainer, set up and timed."""

import argparse
import resource
import statistics
import tempfile
import time
from importlib.metadata import version

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from workload import WARM_UP_STEPS, distinct_letters, prompts


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
    """The set-up that trl_grpo.py explains."""
    sequences = args.prompts * args.answers
    microbatch = args.microbatch or sequences
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
