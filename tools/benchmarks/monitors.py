"""What the monitors of answers cost: their share of a step, by their own clock.

    python tools/benchmarks/monitors.py --model DIR [--prompts 16 --answers 16 --tokens 64] [--json FILE]

One rank trains with FlowRL and a record of distributions.jsonl every step, ten times as often as by default. The clock
runs inside what `monitor.distributions_every=0` leaves out: the table of the losses' answers, the figures and the
record. A difference of two whole runs would be lost in their noise. Shares are medians over the steps.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import WARM_UP_STEPS, distinct_letters, machine, prompts, write

GOAL = 0.01


def main() -> None:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory() as folder:
        row = measure(options, Path(folder))
    met = "" if row["share"] < GOAL else f"  goal {GOAL:g} missed"
    print(f"monitors {1e3 * row['seconds']:.2f} ms of {row['seconds_per_step']:.3f} s a step: {row['share']:.2%}{met}")
    write(options.json, machine("torch", "megatron-core") | {"goal": GOAL}, [row])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What the monitors of answers cost.")
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--answers", type=int, default=16, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=64, help="tokens an answer")
    parser.add_argument("--steps", type=int, default=8, help=f"timed steps, after {WARM_UP_STEPS} of warm-up")
    parser.add_argument("--json")
    return parser


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from flowrl_mega import train
    from flowrl_mega.config import Config
    from flowrl_mega.grading import Grader
    from flowrl_mega.monitor import distributions
    from flowrl_mega.parallel import layout as layouts
    from flowrl_mega.parallel.launch import rank_environment
    from flowrl_mega.preflight import Inputs
    from flowrl_mega.run import Run
    from flowrl_mega.settings import validated

    spent: list[float] = []

    def timed(of: Any, name: str) -> None:
        work: Callable[..., Any] = getattr(of, name)

        def clocked(*arguments: Any) -> Any:
            began = time.perf_counter()
            found = work(*arguments)
            spent.append(time.perf_counter() - began)
            return found

        setattr(of, name, clocked)

    parts = ((train, "columns_of"), (Grader, "watched"), (distributions, "metrics"), (distributions, "record"))
    for of, name in parts:
        timed(of, name)
    os.environ.update(rank_environment(0, 1))
    data = folder / "prompts.jsonl"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(options.prompts)))
    tree = {
        "run_dir": str(folder / "run"),
        "steps": WARM_UP_STEPS + options.steps,
        "model": {"path": options.model},
        "data": {"path": str(data)},
        "reward": f"{__file__}:reward",
        "rollout": {"prompts_per_step": options.prompts, "group_size": options.answers, "max_tokens": options.tokens,
                    "ignore_eos": True},
        "objective": {"name": "flowrl"},
        "checkpoint": {"at_end": False},
        "monitor": {"progress": False, "distributions_every": 1},
    }  # fmt: skip
    config = validated(Config, tree, "")
    Run(Inputs(config), layouts.init(config.parallel, config.seed)).run()
    layouts.shutdown()
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    steps = [line["perf/step_seconds"] for line in lines]
    each = [sum(spent[len(parts) * i : len(parts) * (i + 1)]) for i in range(len(steps))]
    counted = slice(WARM_UP_STEPS, None)
    return {
        **{name: getattr(options, name) for name in ("prompts", "answers", "tokens", "steps")},
        "model": Path(options.model).name,
        "seconds": statistics.median(each[counted]),
        "seconds_per_step": statistics.median(steps[counted]),
        "share": statistics.median(mine / step for mine, step in zip(each[counted], steps[counted], strict=True)),
    }


def reward(row: dict[str, Any], response: str) -> float:
    return distinct_letters(response)


if __name__ == "__main__":
    main()
