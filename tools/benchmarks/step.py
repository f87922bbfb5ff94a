"""One GRPO step by phase, in several layouts.

    python tools/benchmarks/step.py --model DIR [--prompts 16 --answers 16 --tokens 64] [--json FILE]
    python tools/benchmarks/step.py --model DIR --layers 4 --rounds 5      # a model that pp2 divides; jobs in turns

Each layout is a job of its own; the first steps are not counted; figures are medians. With several `--rounds` the
layouts take turns, each round begins with the next one, and the median round counts. Every answer has exactly
`--tokens` tokens. Memory is the ranks' peak resident set, summed.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from workload import WARM_UP_STEPS, distinct_letters, in_turns, machine, median_of, prompts, write

LAYOUTS = {"tp1": {"tp": 1}, "tp2": {"tp": 2}, "pp2": {"pp": 2}, "dp2": {"dp": 2}}
PHASES = ("generate", "reward", "score", "update", "sync")


def main() -> None:
    options = parser().parse_args()
    if options.rank_of:
        run_rank(options)
        return
    with tempfile.TemporaryDirectory() as folder:
        if options.layers:
            options.model = first_layers(options.model, options.layers, folder)
        rows = by_layout(options)
    rates = f"{'trained tok/s':>15}{'generated tok/s':>17}"
    print(f"{'layout':<8}{'s/step':>9}{'of first':>10}{rates}{'peak GB':>9}   phases (s)")
    for row in rows:
        phases = "  ".join(f"{name} {value:.3f}" for name, value in row["phases"].items())
        rates = f"{row['trained_tokens_per_second']:>15,.0f}{row['generated_tokens_per_second']:>17,.0f}"
        ratio = row["seconds_per_step"] / rows[0]["seconds_per_step"]
        times = f"{row['layout']:<8}{row['seconds_per_step']:>9.3f}{ratio:>10.2f}"
        print(f"{times}{rates}{row['peak_rss_bytes'] / 1e9:>9.2f}   {phases}")
    write(options.json, machine("torch", "megatron-core"), rows)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="One GRPO step by phase, in several layouts.")
    add_work(parser)
    parser.add_argument("--layers", type=int, help="of the model only so many, the first")
    parser.add_argument("--rounds", type=int, default=1, help="jobs of each layout")
    parser.add_argument("--layouts", nargs="+", choices=LAYOUTS, default=list(LAYOUTS))
    parser.add_argument("--rank-of", help=argparse.SUPPRESS)
    parser.add_argument("--out", help=argparse.SUPPRESS)
    return parser


def add_work(parser: argparse.ArgumentParser) -> None:
    """Add what describes one job, whoever does it."""
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=16, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer")
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps, after {WARM_UP_STEPS} of warm-up")
    parser.add_argument("--microbatch-tokens", type=int, default=16384, help="of flowrl-mega")
    parser.add_argument("--json")


def first_layers(model: str, layers: int, folder: str) -> str:
    """A copy of the model with its first layers alone."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    AutoModelForCausalLM.from_pretrained(model, num_hidden_layers=layers).save_pretrained(folder)
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    return folder


def by_layout(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Each layout's row of the round that took its median time, with the seconds of all."""
    layers = json.loads((Path(options.model) / "config.json").read_text())["num_hidden_layers"]
    layouts = [layout for layout in options.layouts if layers % LAYOUTS[layout].get("pp", 1) == 0]
    for layout in [layout for layout in options.layouts if layout not in layouts]:
        print(f"{layout}: not run: it does not divide the model's {layers} layers; see --layers")
    rows = []
    for jobs in in_turns({layout: partial(measure, layout, options) for layout in layouts}, options.rounds).values():
        ordered = sorted(jobs, key=lambda row: row["seconds_per_step"])
        rounds = [row["seconds_per_step"] for row in jobs]
        row = ordered[(len(ordered) - 1) // 2]
        rows.append({**row, "layers": options.layers, "seconds_per_step_by_round": rounds})
    return rows


def measure(layout: str, options: argparse.Namespace) -> dict[str, Any]:
    """Run one layout's job; the row of its medians."""
    from flowrl_mega.parallel.launch import launch

    world = math.prod(LAYOUTS[layout].values())
    arguments = [f"--{name.replace('_', '-')}={getattr(options, name)}" for name in
                 ("model", "prompts", "answers", "tokens", "steps", "microbatch_tokens")]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, __file__, *arguments, "--rank-of", layout, "--out", folder]
        if code := launch(command, world, timeout_s=1800):
            sys.exit(f"{layout}: a rank failed with exit code {code}")
        ranks = [json.loads((Path(folder) / f"{rank}.json").read_text()) for rank in range(world)]
    steps = ranks[0]["steps"][WARM_UP_STEPS:]
    seconds = median_of(steps, "perf/step_seconds")
    return {
        "provider": "flowrl-mega",
        "layout": layout,
        "threads_per_rank": max(1, (os.cpu_count() or 1) // world),
        "prompts": options.prompts,
        "answers": options.answers,
        "tokens": options.tokens,
        "seconds_per_step": seconds,
        "tokens_per_second": options.prompts * options.answers * options.tokens / seconds,
        "trained_tokens_per_second": ranks[0]["tokens"] / median_of(steps, "perf/update_seconds"),
        "generated_tokens_per_second": median_of(steps, "perf/generated_tokens_per_second"),
        "peak_rss_bytes": sum(rank["peak_rss_bytes"] for rank in ranks),
        "phases": {phase: median_of(steps, f"perf/{phase}_seconds") for phase in PHASES},
    }


def run_rank(options: argparse.Namespace) -> None:
    """One rank of one layout: train, and write the steps' metrics."""
    from flowrl_mega.config import Config
    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.preflight import Inputs
    from flowrl_mega.run import Run
    from flowrl_mega.settings import validated

    rank, out = os.environ["RANK"], Path(options.out)
    data = out / f"prompts_{rank}.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(options.prompts)))
    rollout = {
        "prompts_per_step": options.prompts, "group_size": options.answers, "max_tokens": options.tokens,
        "ignore_eos": True,
    }  # fmt: skip
    tree = {
        "run_dir": str(out / "run"),
        "steps": WARM_UP_STEPS + options.steps,
        "model": {"path": options.model},
        "parallel": LAYOUTS[options.rank_of],
        "data": {"path": str(data)},
        "reward": f"{__file__}:reward",
        "rollout": rollout,
        "batch": {"tokens_per_microbatch": options.microbatch_tokens},
        "objective": {"name": "grpo"},
        "monitor": {"progress": False},
    }
    config = validated(Config, tree, "")
    run = Run(Inputs(config), layouts.init(config.parallel, config.seed))
    steps = [run.trainer.step()[0] for _ in range(config.steps)]
    tokens = sum((len(p.token_ids) + options.tokens) * options.answers for p in run.inputs.data.prompts)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    (out / f"{rank}.json").write_text(json.dumps({"steps": steps, "tokens": tokens, "peak_rss_bytes": peak}))
    layouts.shutdown()


def reward(row: dict[str, Any], response: str) -> float:
    return distinct_letters(response)


if __name__ == "__main__":
    main()
