"""Rewards a second: DAPO's rule, math-verify and sandboxed code, in one process and through pools of workers, in turns.

    python tools/benchmarks/rewards.py [--answers 600] [--programs 60] [--rewards NAME ...] [--rounds 5] [--json FILE]
        [--against CHECKOUT [--data DIR]]

Math answers are the pairs of tests/rewards/math_pairs.tsv, each wrapped as a response, over and over; every program
solves a task with three tests of stdin and stdout. `direct` calls the function in this process, as reward.workers=0
does; `1 worker` and `2 workers` send rows and texts through the pool of the trainer. Workers are warm: what they import
and math-verify's cache of gold answers are there. Scores are compared with the direct ones before any is timed. Each
round begins with the next provider; figures are medians over the rounds.

--against compares with an earlier checkout instead, each in a process of its own that has imported all, met the gold
answers and the table of pairs, but none of the answers that it grades; math by CPU time. With --data the sets are also
gold answers of its files, of which every second response gives another problem's.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rewards_work import Call, Timed
from workload import in_turns, machine, turns, write

from flowrl_mega.config import RewardSettings
from flowrl_mega.rewards.load import Score, call, load_reward
from flowrl_mega.rewards.pool import Pool

REWARDS = ("math:dapo", "math:verify", "code:score")
REPO = Path(__file__).resolve().parents[2]
PAIRS = REPO / "tests" / "rewards" / "math_pairs.tsv"
FILES = ("aime24", "aime25", "gsm8k_test", "math500", "olympiadbench", "flowrl_train_aime", "flowrl_train_math")
THOUGHTS = "Let us see what follows from that, step by step.\n" * 40
TESTS = {"type": "stdin", "inputs": ["1 2\n", "40 2\n", "-5 5\n"], "outputs": ["3\n", "42\n", "0\n"]}
PROGRAM = "```python\na, b = map(int, input().split())\nprint(a + b)\n```"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Rewards a second.")
    parser.add_argument("--answers", type=int, default=600, help="math answers a measurement")
    parser.add_argument("--programs", type=int, default=60, help="programs a measurement")
    parser.add_argument("--rewards", nargs="+", choices=REWARDS, default=REWARDS, help="only these")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--against", type=Path, help="an earlier checkout of this repository")
    parser.add_argument("--data", type=Path, help="with --against: folder of JSON lines with 'answer'")
    parser.add_argument("--json")
    return parser


def main() -> None:
    options = parser().parse_args()
    load, rows = os.getloadavg()[0], []
    for name, work in works(options.answers, options.programs).items():
        if name not in options.rewards:
            continue
        spec = f"flowrl_mega.rewards.{name}"
        if options.against is None:
            rows += compared(spec, work, options.rounds)
            continue
        sets = {"table of pairs" if "math" in name else "sums": work}
        if "math" in name and options.data:
            sets |= gold_answers(options.data, options.answers)
        rows += [against(options.against.resolve(), spec, *item, options.rounds, work) for item in sets.items()]
    for row in rows:
        base = "direct" if options.against is None else "before"
        what = f"{row['reward']:32} {row['provider' if base == 'direct' else 'set']:17}"
        print(f"{what} {row['per_second']:9.0f}/s {row['of_' + base]:6.2f} of {base}")
    write(options.json, machine("math-verify", "sympy") | {"load_before": load}, rows)


def works(answers: int, programs: int) -> dict[str, list[Call]]:
    lines = [line.split("\t") for line in PAIRS.read_text().splitlines() if line and not line.startswith("#")]
    pairs = [lines[i % len(lines)] for i in range(answers)]
    return {
        "math:dapo": [({"answer": gold}, f"So it must be.\nAnswer: {given}") for gold, given, *_ in pairs],
        "math:verify": [({"answer": gold}, f"So it is $\\boxed{{{given}}}$.") for gold, given, *_ in pairs],
        "code:score": [({"tests": TESTS}, PROGRAM)] * programs,
    }


def gold_answers(data: Path, most: int) -> dict[str, list[Call]]:
    """By file. Right answers have another fraction bar: what is the gold answer to the letter costs nothing."""
    found = {}
    for name in FILES:
        if not (file := data / f"{name}.jsonl").exists():
            continue
        with file.open() as lines:
            golds = list(dict.fromkeys(answer for line in lines if (answer := json.loads(line)["answer"]).strip()))
        golds = golds[:: -(-len(golds) // most)]
        given = [gold.replace("\\frac", "\\dfrac") if i % 2 else golds[i - 1] for i, gold in enumerate(golds)]
        found[name] = [
            ({"answer": gold}, f"{THOUGHTS}So it is $\\boxed{{{one}}}$.\nAnswer: {one}")
            for gold, one in zip(golds, given, strict=True)
        ]
    return found


def against(before: Path, spec: str, name: str, work: list[Call], rounds: int, others: list[Call]) -> dict[str, Any]:
    """Rewards a second of this checkout and of an earlier one."""
    warm_up = [(row, f"\\boxed{{{row['answer']}}}") if "answer" in row else (row, said) for row, said in work]
    warm_up += others if others is not work else []
    processes = {side: Timed(folder, spec, work, warm_up) for side, folder in (("now", REPO), ("before", before))}
    try:
        seconds = in_turns({side: process.seconds for side, process in processes.items()}, rounds)
        given = zip(*(process.rewards for process in processes.values()), strict=True)
    finally:
        for process in processes.values():
            process.close()
    return {
        "reward": spec,
        "set": name,
        "calls": len(work),
        "per_second": len(work) / statistics.median(seconds["now"]),
        "of_before": statistics.median(seconds["before"]) / statistics.median(seconds["now"]),
        "other_rewards": sum(one != other for one, other in given),
        "seconds": seconds,
    }


def compared(spec: str, work: list[Call], rounds: int) -> list[dict[str, Any]]:
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
