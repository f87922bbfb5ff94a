"""Rewards a second: DAPO's rule, math-verify and sandboxed code, in one process and through pools of workers, in turns.

    python tools/benchmarks/rewards.py [--answers 600] [--programs 60] [--rewards NAME ...] [--rounds 5] [--json FILE]

Math answers are the pairs of tests/rewards/math_pairs.tsv, each wrapped as a response, over and over; every program
solves a task with three tests of stdin and stdout. `direct` calls the function in this process, as reward.workers=0
does; `1 worker` and `2 workers` send rows and texts through the pool of the trainer. Workers are warm: what they import
and math-verify's cache of gold answers are there. Scores are compared with the direct ones before any is timed. Each
round begins with the next provider; figures are medians over the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from workload import machine, turns, write

from flowrl_mega.config import RewardSettings
from flowrl_mega.rewards.load import Score, call, load_reward
from flowrl_mega.rewards.pool import Pool

REWARDS = ("math:dapo", "math:verify", "code:score")
PAIRS = Path(__file__).parents[2] / "tests" / "rewards" / "math_pairs.tsv"
TESTS = {"type": "stdin", "inputs": ["1 2\n", "40 2\n", "-5 5\n"], "outputs": ["3\n", "42\n", "0\n"]}
PROGRAM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"
Work = tuple[dict[str, Any], str]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rewards a second.")
    parser.add_argument("--answers", type=int, default=600, help="math answers a measurement")
    parser.add_argument("--programs", type=int, default=60, help="programs a measurement")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=REWARDS, help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json")
    return parser


def main() -> None:
    options = parser().parse_args()
    load, rows = os.getloadavg()[0], []
    for name, work in works(options.answers, options.programs).items():
        if name in options.rewards:
            rows += compared(f"flowrl_mega.rewards.{name}", work, options.rounds)
    for row in rows:
        print(f"{row['reward']:32} {row['provider']:10} {row['per_second']:9.0f}/s {row['of_direct']:6.2f} of direct")
    write(options.json, machine("math-verify", "sympy") | {"load_before": load}, rows)


def works(answers: int, programs: int) -> dict[str, list[Work]]:
    lines = [line.split("\t") for line in PAIRS.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [lines[i % len(lines)] for i in range(answers)]
    return {
        "math:dapo": [({"answer": gold}, f"So it must be.\nAnswer: {given}") for gold, given, *_ in pairs],
        "math:verify": [({"answer": gold}, f"So it is $\\boxed{{{given}}}$.") for gold, given, *_ in pairs],
        "code:score": [({"tests": TESTS}, PROGRAM)] * programs,
    }


def compared(spec: str, work: list[Work], rounds: int) -> list[dict[str, Any]]:
    settings = RewardSettings(function=spec)
    reward = load_reward(settings)
    pools = {f"{n} worker{'s' * (n > 1)}": Pool(settings, n) for n in (1, 2)}
    providers: dict[str, Callable[[], list[Score]]] = {"direct": lambda: [call(reward, *item) for item in work]}
    for name, pool in pools.items():
        providers[name] = lambda pool=pool: [future.result() for future in [pool.submit(*item) for item in work]]
    try:
        expected = providers["direct"]()
        for _ in range(2):  # twice, so that each worker has seen the most of it
            for name, provider in providers.items():
                assert provider() == expected, f"{spec}: other scores from {name}"
        seconds: dict[str, list[float]] = {name: [] for name in providers}
        for name in turns(providers, rounds):
            start = time.perf_counter()
            providers[name]()
            seconds[name].append(time.perf_counter() - start)
    finally:
        for pool in pools.values():
            pool.close()
    median = {name: statistics.median(values) for name, values in seconds.items()}
    return [
        {
            "reward": spec,
            "provider": name,
            "per_second": len(work) / median[name],
            "of_direct": median["direct"] / median[name],
            "seconds": seconds[name],
        }
        for name in providers
    ]


if __name__ == "__main__":
    main()
