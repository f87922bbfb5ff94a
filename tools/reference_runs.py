"""A dozen short runs of any checkout, for tools/compare_runs.py: what a refactoring must not change.

    python tools/reference_runs.py OUT --model HF_FOLDER                     # by this checkout
    python tools/reference_runs.py OLD --model HF_FOLDER --checkout FOLDER   # by another one, with its own .venv
    python tools/compare_runs.py OLD OUT

Every objective, four layouts, both critics, dropout, importance weights, one update and several: four steps each on
the task of sums, on CPU. Runs that OUT has already are left as they are.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import yaml

FLOWRL = {"name": "flowrl", "beta": 2.0}
ALONE, RATES = {"tp": 1}, {"lr": 1e-3, "warmup_steps": 3}  # without log Z there is no learning rate for it
COMMON: dict[str, Any] = {
    "steps": 4,
    "parallel": {"tp": 2},
    "data": {"task": "sums", "task_args": {"lo": 10, "hi": 30}, "held_out": 0.2},
    "reward": "flowrl_mega.rewards.sums:score",
    "rollout": {"prompts_per_step": 4, "group_size": 4, "max_tokens": 8},
    "objective": FLOWRL,
    "optimizer": {**RATES, "log_z_lr": 1e-2},
    "batch": {"mini_batch": 8, "tokens_per_microbatch": 48},
    "checkpoint": {"every": 2},
    "evaluation": {"every": 2, "samples": 2},
    "monitor": {"progress": False},
}
ADAPTIVE_KL = {"name": "ppo", "kl_coef": 0.1, "kl_target": 0.05, "kl_horizon": 80}
RUNS: dict[str, dict[str, Any]] = {
    "flowrl_tp1": {"parallel": ALONE},
    "flowrl_tp2": {},
    "flowrl_tp2_sp": {"parallel": {"tp": 2, "sequence_parallel": True}},
    "flowrl_dp2": {"parallel": {"dp": 2}},
    "flowrl_one_update": {"parallel": ALONE, "batch": {"tokens_per_microbatch": 48}},
    "flowrl_group_z": {"objective": {**FLOWRL, "z": "group"}, "optimizer": RATES},
    "flowrl_tis_dropout_pp2": {"parallel": {"pp": 2}, "objective": {**FLOWRL, "tis": "sum", "z_dropout": 0.1}},
    "grpo": {"parallel": ALONE, "objective": {"name": "grpo"}, "optimizer": RATES},
    "gspo": {"parallel": ALONE, "objective": {"name": "gspo"}, "optimizer": RATES},
    "reinforce_pp": {"parallel": ALONE, "objective": {"name": "reinforce_pp"}, "optimizer": RATES},
    "ppo_own_critic": {
        "parallel": ALONE, "objective": ADAPTIVE_KL, "optimizer": RATES,
        "critic": {"warmup_steps": 1, "optimizer": {"lr": 1e-3}},
    },
    "ppo_shared_critic": {
        "parallel": ALONE, "objective": {"name": "ppo", "kl_coef": 0.1}, "optimizer": RATES,
        "critic": {"trunk": "shared", "optimizer": {"lr": 1e-3}},
    },
}  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=Path, help="folder for the run folders")
    parser.add_argument("--model", type=Path, required=True, help="Hugging Face folder; tokens for 0-9 + :")
    parser.add_argument("--checkout", type=Path, default=Path(__file__).parents[1], help="whose trainer (this one)")
    options = parser.parse_args()
    out = options.out.resolve()
    command = [str(options.checkout.resolve() / ".venv/bin/flowrl-mega"), "train"]
    failed = False
    for name, changes in RUNS.items():
        if (out / name / "metrics.jsonl").exists():
            continue
        (out / name).mkdir(parents=True, exist_ok=True)
        config = {"run_dir": str(out / name), "model": {"path": str(options.model.resolve())}, **COMMON, **changes}
        file = out / f"{name}.yaml"
        file.write_text(yaml.safe_dump(config))
        code = subprocess.run([*command, str(file)], env={**os.environ, "OMP_NUM_THREADS": "1"}).returncode
        print(f"{name}: exit code {code}", flush=True)
        failed |= code != 0
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
