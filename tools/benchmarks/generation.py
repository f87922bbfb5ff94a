"""Sampling speed: the embedded engine's decoder against transformers' generate(), in turns, in one run.

    python tools/benchmarks/generation.py --model DIR [--batch 64 256] [--tokens 64] [--rounds 5] [--json FILE]

Same weights, same prompts, temperature 1, exactly `--tokens` new tokens. generate() runs in one process on all cores;
the engine as it trains: a process a core, each with its share of the batch (one process on a GPU).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

from workload import in_turns, machine, prompts, write


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The embedded engine against transformers' generate().")
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--batch", type=int, nargs="+", default=[64, 256])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    options = parser().parse_args()
    if options.out:
        run_rank(options)
        return
    rows = []
    for batch in options.batch:
        works = {"theirs": partial(with_transformers, batch, options), "ours": partial(with_engine, batch, options)}
        sides = in_turns(works, options.rounds).values()
        theirs, ours = (batch * options.tokens / statistics.median(seconds) for seconds in sides)
        rows.append({"batch": batch, "tokens": options.tokens, "transformers": theirs, "engine": ours})
        print(f"batch {batch:>4}: transformers {theirs:>8,.0f} tok/s, engine {ours:>8,.0f} tok/s, {ours / theirs:.2f}x")
    write(options.json, machine("torch", "transformers", "megatron-core"), rows)


def with_transformers(batch: int, options: argparse.Namespace) -> float:
    """Seconds of one generate() after one that warms up."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(os.cpu_count() or 1)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(options.model, dtype=torch.float32).to(device)
    tokenizer = AutoTokenizer.from_pretrained(options.model, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    inputs = tokenizer(prompts(batch), return_tensors="pt", padding=True).to(device)
    inputs.pop("token_type_ids", None)
    work = dict(max_new_tokens=options.tokens, min_new_tokens=options.tokens, do_sample=True, temperature=1.0, top_k=0)
    return _seconds(lambda: model.generate(**inputs, **work, pad_token_id=tokenizer.pad_token_id))


def with_engine(batch: int, options: argparse.Namespace) -> float:
    """Seconds of the slowest rank, in a job of its own."""
    import torch

    from flowrl_mega.parallel.launch import launch

    world = 1 if torch.cuda.is_available() else os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, "--model", options.model, "--tokens", str(options.tokens)]
        if code := launch([*command, "--batch", str(batch), "--out", folder], world, timeout_s=600):
            sys.exit(f"a rank failed with exit code {code}")
        return max(json.loads(file.read_text()) for file in Path(folder).iterdir())


def run_rank(options: argparse.Namespace) -> None:
    from transformers import AutoTokenizer

    from flowrl_mega.config import Config, ParallelSettings
    from flowrl_mega.model.architecture import read_architecture
    from flowrl_mega.model.generation import Sampling
    from flowrl_mega.model.policy import Policy
    from flowrl_mega.model.weights import load_hf
    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.rollout import EmbeddedEngine, generate
    from flowrl_mega.settings import validated

    layout = layouts.init(ParallelSettings(), seed=0)
    tree: dict[str, Any] = {"run_dir": "-", "steps": 1, "model": {"path": options.model}, "data": {"task": "sums"}}
    policy = Policy(read_architecture(options.model), validated(Config, tree | {"reward": "-"}, ""), layout, None)
    load_hf(policy, options.model)
    engine = EmbeddedEngine(layout)
    engine.sync(policy, version=0)
    tokenizer = AutoTokenizer.from_pretrained(options.model)
    ids = [tokenizer(prompt)["input_ids"] for prompt in prompts(options.batch[0])]
    seconds = _seconds(lambda: generate(engine, ids, 1, Sampling(options.tokens), seed=0))
    (Path(options.out) / f"{layout.rank}.json").write_text(json.dumps(seconds))
    layouts.shutdown()


def _seconds(work: Any) -> float:
    work()
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
