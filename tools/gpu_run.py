"""A short FlowRL run of a tiny random model on the built-in task, for tools/gpu_check.sh.

    python tools/gpu_run.py FOLDER [section.field=value ...]

The settings are what `flowrl-mega train` takes. Prints the steps' metrics as one line of JSON.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from pathlib import Path

REPO = Path(__file__).resolve().parent.parent
STEPS = 4
# FP8 takes sizes that 16 divides, and keeps the first and the last layer in bf16.
SIZES = dict(
    hidden_size=256, intermediate_size=512, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    initializer_range=0.05,
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="A short FlowRL run of a tiny random model on the built-in task.")
    parser.add_argument("folder", type=Path, help="for the model and the run; what is in it is deleted first")
    parser.add_argument("settings", nargs="*", metavar="section.field=value", help="as `flowrl-mega train` takes them")
    return parser


def with_budget(settings: list[str]) -> list[str]:
    """Random weights are no measure of FP8: emulated they are off by up to 0.11 nats, and the default stops at 0.1."""
    is_fp8 = any(change.startswith("model.fp8=") and change != "model.fp8=off" for change in settings)
    return [*(["model.fp8_budget=0.5"] if is_fp8 else []), *settings]


def main() -> int:
    options = parser().parse_args()
    # Seconds, so only after the arguments have been looked at; the GPU machine has neither package installed.
    sys.path[:0] = [str(REPO), str(REPO / "tests")]
    import yaml
    from tiny_models import make

    from flowrl_mega import cli

    folder: Path = options.folder
    shutil.rmtree(folder, ignore_errors=True)
    model = make("llama", folder / "model", vocab=32, **SIZES)
    tree = {
        "run_dir": str(folder / "run"), "steps": STEPS, "model": {"path": str(model)}, "data": {"task": "sums"},
        "reward": "flowrl_mega.rewards.sums:score", "objective": {"name": "flowrl", "beta": 2.0},
        "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 8},
        "optimizer": {"lr": 1e-4, "warmup_steps": 0}, "batch": {"mini_batch": 8},
        "monitor": {"progress": False},
    }  # fmt: skip
    config = folder / "config.yaml"
    config.write_text(yaml.safe_dump(tree))
    code = cli.main(["train", str(config), *(f"--{change}" for change in with_budget(options.settings))])
    if code == 0:
        lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
        print(json.dumps([json.loads(line) for line in lines]))
    return code


if __name__ == "__main__":
    sys.exit(main())
