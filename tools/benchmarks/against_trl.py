"""The same GRPO work by TRL's GRPOTrainer and by flowrl-mega, in turns, in one run.

    make setup-integration      # TRL, among others
    python tools/benchmarks/against_trl.py --model DIR [--prompts 16 --answers 16 --tokens 64] [--layout dp2]
        [--rounds 3] [--trl-python PYTHON] [--json FILE]

Both use all cores. A round is one job of each; the ratio is that of the medians over rounds, memory the largest peak.
trl_grpo.py says how TRL is set up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

import step
from workload import in_turns, machine, write


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="The same GRPO work by TRL and by flowrl-mega, in turns.")
    step.add_work(parser)
    parser.add_argument("--trl-python", default=sys.executable, help="interpreter that has TRL; default: this one")
    parser.add_argument("--layout", choices=step.LAYOUTS, default="dp2", help="of flowrl-mega")
    parser.add_argument("--rounds", type=int, default=3, help="jobs of each")
    return parser


def main() -> None:
    options = parser().parse_args()
    jobs = {"trl": partial(run_trl, options), "flowrl-mega": partial(step.measure, options.layout, options)}
    rows = [summary(of) for of in in_turns(jobs, options.rounds).values()]
    speed = rows[1]["tokens_per_second"] / rows[0]["tokens_per_second"]
    memory = rows[1]["peak_rss_bytes"] / rows[0]["peak_rss_bytes"]
    for row in rows:
        print(
            f"{row['provider']:<12}{row['seconds_per_step']:>8.3f} s/step{row['tokens_per_second']:>9,.0f} tok/s"
            f"{row['peak_rss_bytes'] / 1e9:>7.2f} GB"
        )
    print(f"flowrl-mega / TRL: {speed:.2f}x tokens/s, {memory:.2f}x peak memory")
    rows.append({"provider": "ratio", "tokens_per_second": speed, "peak_rss_bytes": memory})
    write(options.json, machine("torch", "megatron-core"), rows)


def run_trl(options: argparse.Namespace) -> dict[str, Any]:
    work = [f"--{name}={getattr(options, name)}" for name in ("model", "prompts", "answers", "tokens", "steps")]
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "trl.json"
        script = str(Path(__file__).with_name("trl_grpo.py"))
        command = [options.trl_python, script, *work, f"--threads={os.cpu_count()}", f"--json={file}"]
        if code := subprocess.run(command, stdout=subprocess.DEVNULL, timeout=1800).returncode:
            sys.exit(code)  # it has said why
        return json.loads(file.read_text())


def summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """The first round's row with the median speed and the largest peak, and every round's seconds."""
    return rounds[0] | {
        "seconds_per_step": statistics.median(r["seconds_per_step"] for r in rounds),
        "tokens_per_second": statistics.median(r["tokens_per_second"] for r in rounds),
        "peak_rss_bytes": max(r["peak_rss_bytes"] for r in rounds),
        "seconds_per_step_by_round": [round(r["seconds_per_step"], 3) for r in rounds],
    }


if __name__ == "__main__":
    main()
