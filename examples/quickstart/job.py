"""What each rank of the quick start runs: warm start, then every method from it, measured exactly.

    python -m examples.quickstart.job TRIALS.json     (run.py and compare.py write the file and start the ranks)

TRIALS.json: {"dir", "seed", "trials": {name: [overrides]}}. Each trial's figures go to DIR/results.json as it ends;
trials that are there already are not run again.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch.distributed as dist

from examples.quickstart.warm_start import warm_start
from flowrl_mega.config import Config
from flowrl_mega.config_file import load_config
from flowrl_mega.evaluation.exact import exact_metrics, spread_metrics
from flowrl_mega.model.policy import Policy, build_reference
from flowrl_mega.model.weights import load_hf
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.train import Trainer, as_sequences

CONFIG = Path(__file__).with_name("quickstart.yaml")
K = 64
SPREAD_ANSWERS = 32


def measure(trainer: Trainer, reference: Policy) -> dict[str, float]:
    """Exact figures over the training prompts, the held-out prompts', and entropy and KL by sampling."""
    assert trainer.held_out is not None
    prompts = trainer.prompts.prompts
    figures = exact_metrics(trainer.right_answers(prompts), K)
    held_out = exact_metrics(trainer.right_answers(trainer.held_out.prompts), K)
    figures |= {f"held_out_{name}": held_out[name] for name in ("pass_rate", "distinct")}
    drawn = as_sequences([prompt.token_ids for prompt in prompts], trainer.generate(prompts, SPREAD_ANSWERS))
    spread = spread_metrics(trainer.policy, reference, drawn, trainer.sampling.temperature)
    return figures | spread


def run_trial(config: Config, layout: Layout) -> dict[str, float]:
    """Train with these settings; the figures of the trained policy."""
    began = time.perf_counter()
    trainer = Trainer(config, layout)
    trainer.run()
    seconds = time.perf_counter() - began
    reference = trainer.reference
    if reference is None:  # plain GRPO trains without one
        reference = build_reference(trainer.policy.arch, config, layout)
        load_hf(reference, config.model.path)
    return measure(trainer, reference) | {"seconds": seconds}


def run_warm_start(config: Config, layout: Layout) -> dict[str, float]:
    """Make the warm start; its own figures, in the same columns."""
    began = time.perf_counter()
    steps = warm_start(config, layout)
    seconds = time.perf_counter() - began
    trainer = Trainer(config, layout)
    return measure(trainer, trainer.policy) | {"seconds": seconds, "steps": steps}


def main(path: str) -> None:
    job: dict[str, Any] = json.loads(Path(path).read_text())
    folder = Path(job["dir"])
    common = [f"seed={job['seed']}", f"model.path={folder / 'start'}", *job.get("overrides", [])]
    config = load_config(CONFIG, [*common, f"run_dir={folder / 'start_run'}"])
    layout = layouts.init(config.parallel, config.seed)
    file = folder / "results.json"
    results: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}
    if "start" not in results:
        results["start"] = run_warm_start(config, layout)
        _write(file, results, layout)
    for name, overrides in job["trials"].items():
        if name not in results:
            trial = load_config(CONFIG, [*common, f"run_dir={folder / name.replace(' ', '_')}", *overrides])
            if layout.rank == 0:
                print(f"\n{name} (seed {job['seed']})", flush=True)
            results[name] = run_trial(trial, layout)
            _write(file, results, layout)
    layouts.shutdown()


def _write(file: Path, results: dict[str, Any], layout: Layout) -> None:
    if layout.rank == 0:
        partial = file.with_suffix(".partial")
        partial.write_text(json.dumps(results, indent=1))
        partial.rename(file)
    dist.barrier()


if __name__ == "__main__":
    main(sys.argv[1])
