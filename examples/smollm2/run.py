"""A real pretrained model on real tasks: SmolLM2-135M-Instruct learns arithmetic from reasoning-gym with FlowRL.

    python -m examples.smollm2.run [--minutes 20] [--section.field=value ...]

Makes what examples/smollm2.yaml names (the model folder, the data) where it is missing, trains until the steps are
done or the time is up, and says whether the mean reward rose. Running it again resumes.
"""

import argparse
import json
import os
import re
import signal
import statistics
import sys
import threading
from pathlib import Path
from typing import Any

from flowrl_mega import cli
from flowrl_mega.config_file import load_config
from flowrl_mega.data.prepare.reasoning_gym import make_rows, write_jsonl
from tools.fetch_smollm2 import fetch

BAD_INPUT, STOPPED = 2, 75  # flowrl-mega's exit codes: wrong input; stopped on request, with a checkpoint saved
CONFIG = Path("examples/smollm2.yaml")
RUN = Path("runs/smollm2")

# Tasks that the untrained model sometimes solves: mean reward 0.13 over the first 3 steps (temperature 1, 96 answers of
# at most 48 tokens). It lectures instead of answering, so there is much to learn in few steps.
TASKS = {
    "products": {"min_digits": 1, "max_digits": 1},
    "gcd": {"min_value": 1, "max_value": 20},
}
PROMPTS_PER_TASK = 400


def prepare() -> None:
    """The model folder and the training data, unless they are there."""
    print(f"model: {fetch(RUN / 'model')}")
    data = RUN / "train.jsonl"
    if not data.is_file():
        rows = [row for task, config in TASKS.items() for row in make_rows(task, PROMPTS_PER_TASK, seed=0, **config)]
        write_jsonl([row for row in rows if not answered_by_itself(row)], data)
    print(f"data:  {data}")


def answered_by_itself(row: dict[str, Any]) -> bool:
    """Whether a prompt names its own answer ("9 * 0"): repeating it would be rewarded, and is soon learnt."""
    return row["answer"] in re.findall(r"\d+", row["prompt"])


def train(minutes: float, overrides: list[str]) -> int:
    """`flowrl-mega train`, asked to save and stop (SIGTERM) when the time is up; returns its exit code."""
    timer = threading.Timer(minutes * 60, os.kill, (os.getpid(), signal.SIGTERM))
    timer.daemon = True
    timer.start()
    try:
        return cli.main(["train", str(CONFIG), "--resume", "auto", *overrides])
    finally:
        timer.cancel()


def verdict(rewards: list[float]) -> str:
    """Whether the last quarter's mean reward is above the first's by two standard errors of the difference."""
    quarter = len(rewards) // 4
    if quarter < 2:
        return f"{len(rewards)} steps are too few to compare quarters (8 or more)"
    first, last = rewards[:quarter], rewards[-quarter:]
    gain = statistics.mean(last) - statistics.mean(first)
    error = ((statistics.variance(first) + statistics.variance(last)) / quarter) ** 0.5
    answer = "above" if gain > 2 * error else "NOT above"
    return (
        f"mean reward {statistics.mean(first):.3f} in the first quarter, {statistics.mean(last):.3f} in the last "
        f"({quarter} steps each): {gain:+.3f}, {answer} two standard errors ({2 * error:.3f})"
    )


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m examples.smollm2.run", description=__doc__.splitlines()[0])
    parser.add_argument(
        "--minutes", type=float, default=20.0, help="stop after the step that ends past this (default 20)"
    )
    return parser


def main(arguments: list[str] | None = None) -> int:
    options, overrides = parser().parse_known_args(arguments)
    try:
        prepare()
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return BAD_INPUT
    code = train(options.minutes, overrides)
    if code not in (0, STOPPED) or "--dry-run" in overrides:
        return code
    run_dir = Path(load_config(CONFIG, overrides).run_dir)
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    print(f"samples: {run_dir / 'samples.jsonl'}")
    print(verdict([json.loads(line)["reward/mean"] for line in lines]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
