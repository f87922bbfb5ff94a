"""Steps that wait for their answers against steps whose answers were begun four steps before, with one SGLang server.

    python tools/benchmarks/ahead.py --model DIR --python SERVER_PYTHON [--ahead 4 --steps 20 --rounds 3] [--json FILE]

Jobs of `flowrl-mega train` in turns, on one running server, which like the trainer has a core of its own: GFlowRL,
whose ratios are against who wrote the answers, 8 prompts x 8 answers of 48 tokens. Seconds are the mean of a job's
steps, without the first ones; the ratio is the median of the rounds' ratios. Beside them the result: the reward's mean
over the last fifth of the steps (letters of an answer that differ).
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from client import has_gpu
from workload import distinct_letters, machine, prompts, turns, write

GOAL = 1.4
WARM_UP = 6  # steps


def main() -> None:
    options = parser().parse_args()
    with tempfile.TemporaryDirectory(prefix="ahead-") as folder:
        row = measure(options, Path(folder))
    met = "" if row["ratio"] >= GOAL else f"  goal {GOAL:g} missed"
    waiting, begun = row["seconds_per_step"]["0"], row["seconds_per_step"][str(options.ahead)]
    print(f"ahead 0: {waiting:.3f} s a step, ahead {options.ahead}: {begun:.3f} s, {row['ratio']:.2f}x{met}")
    print(f"reward at the end: {row['reward']}")
    write(options.json, machine("torch", "megatron-core") | {"sglang": row.pop("sglang"), "goal": GOAL}, [row])


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Training with answers begun ahead against waiting for them.")
    parser.add_argument("--model", required=True, help="Hugging Face model folder")
    parser.add_argument("--python", required=True, help="interpreter that has sglang")
    parser.add_argument("--ahead", type=int, default=4)
    parser.add_argument("--steps", type=int, default=20, help=f"{WARM_UP} of which are not counted")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--answers", type=int, default=8, help="answers a prompt")
    parser.add_argument("--tokens", type=int, default=48, help="tokens an answer")
    parser.add_argument("--json")
    return parser


def measure(options: argparse.Namespace, folder: Path) -> dict[str, Any]:
    from flowrl_mega.config import RolloutSettings
    from flowrl_mega.rollout.sglang.flags import sglang_version
    from flowrl_mega.rollout.sglang.fleet import Fleet

    on_cpu = {"max_total_tokens": 16384, "mem_fraction_static": 0.3} if not has_gpu() else {}
    server_args = {**on_cpu, "skip_server_warmup": True}
    settings = RolloutSettings(engine="sglang", servers=1, python=options.python, server_args=server_args)
    dtype = "fp32" if on_cpu else "bf16"
    fleet = Fleet(settings, Path(options.model), folder, dtype, trainer_gpus=0, load_format="auto")
    fleet.start()
    found: dict[int, list[tuple[float, float]]] = {0: [], options.ahead: []}
    try:
        for ahead in turns(found, options.rounds):
            found[ahead].append(job(options, ahead, fleet.urls[0], folder / f"{ahead}_{len(found[ahead])}"))
    finally:
        fleet.close()
    pairs = zip(found[0], found[options.ahead], strict=True)
    names = ("ahead", "steps", "rounds", "prompts", "answers", "tokens")
    return {
        **{name: getattr(options, name) for name in names},
        "ratio": statistics.median(waiting / begun for (waiting, _), (begun, _) in pairs),
        "seconds_per_step": {str(a): statistics.median(s for s, _ in rows) for a, rows in found.items()},
        "reward": {str(a): [round(reward, 3) for _, reward in rows] for a, rows in found.items()},
        "samples": {str(a): [seconds for seconds, _ in rows] for a, rows in found.items()},
        "sglang": sglang_version(options.python),
    }


def job(options: argparse.Namespace, ahead: int, url: str, folder: Path) -> tuple[float, float]:
    """One training run: (seconds a step, the reward at its end)."""
    folder.mkdir()
    data, config = folder / "prompts.jsonl", folder / "config.yaml"
    data.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts(options.prompts)))
    rollout = {
        "engine": "sglang", "servers": [url], "prompts_per_step": options.prompts, "group_size": options.answers,
        "max_tokens": options.tokens, "ignore_eos": True, "ahead": ahead,
    }  # fmt: skip
    tree = {
        "run_dir": str(folder / "run"),
        "steps": options.steps,
        "model": {"path": str(Path(options.model).resolve())},
        "data": {"path": str(data)},
        "reward": f"{Path(__file__).resolve()}:reward",
        "rollout": rollout,
        "objective": {"name": "gflowrl", "beta": 0.1},
        "optimizer": {"lr": 1e-4},
        "checkpoint": {"at_end": False},
    }
    config.write_text(json.dumps(tree))
    command = [sys.executable, "-m", "flowrl_mega.cli", "train", str(config)]
    threads = {} if has_gpu() else {"OMP_NUM_THREADS": "1"}  # the server's core is its own
    done = subprocess.run(command, env=os.environ | threads, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        sys.exit(f"ahead {ahead}: the job failed:\n{done.stdout[-2000:]}{done.stderr[-4000:]}")
    steps = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    counted = [step["perf/step_seconds"] for step in steps[WARM_UP:]]
    last = steps[-max(1, len(steps) // 5) :]
    return statistics.mean(counted), statistics.mean(step["reward/mean"] for step in last)


def reward(row: dict[str, Any], response: str) -> float:
    return distinct_letters(response)


if __name__ == "__main__":
    main()
