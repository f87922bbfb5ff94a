"""What each rank of the quick start runs: trials, each measured exactly. The trial "start" makes the model that the
others of its folder start from.

No command: trials.py writes a file of trials and starts the ranks, which call `main` with its path. The file holds
{"trials": [{"folder", "seed", "name", "overrides"}], "side_by_side", "may_diverge", "overrides"}. All ranks work on
each trial, or, side by side, each is a job of its own and takes every n-th one. A trial's figures go to its run folder
when it ends; one that has them already, of the same overrides, is not run again.
"""

from __future__ import annotations

import json
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch.distributed as dist

from flowrl_mega.config import Config, ConfigError, Diverged, RunError
from flowrl_mega.evaluation.exact import exact_metrics, spread_metrics
from flowrl_mega.experience import as_sequences
from flowrl_mega.faults import BAD_INPUT, CANNOT_GO_ON, run_as_rank
from flowrl_mega.model.policy import Policy, build_reference
from flowrl_mega.model.weights import load_hf
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.preflight import Inputs
from flowrl_mega.quickstart.trials import Figures, Trial
from flowrl_mega.quickstart.warm_start import warm_start
from flowrl_mega.run import Run

K = 64
SPREAD_ANSWERS = 32


def measure(job: Run, reference: Policy) -> Figures:
    """Exact figures over the training prompts, the held-out prompts', and entropy and KL by sampling."""
    policy, evaluator = job.models.policy, job.evaluator
    prompts, held_out = job.inputs.data.prompts, job.inputs.data.held_out
    assert held_out is not None
    figures = exact_metrics(evaluator.right_answers(prompts, policy), K)
    on_held_out = exact_metrics(evaluator.right_answers(held_out, policy), K)
    figures |= {f"held_out_{name}": on_held_out[name] for name in ("pass_rate", "distinct")}
    drawn = as_sequences([prompt.token_ids for prompt in prompts], evaluator.rollouts(prompts, SPREAD_ANSWERS))
    return figures | spread_metrics(policy, reference, drawn, evaluator.sampling.temperature)


def clock(layout: Layout) -> float:
    """Seconds; of a rank that is alone on a CPU those of its one core, whatever else the machine does."""
    alone_on_cpu = layout.world == 1 and layout.device.type == "cpu"
    return time.process_time() if alone_on_cpu else time.perf_counter()


def run_trial(config: Config, layout: Layout) -> Figures:
    """Train with these settings; the figures of the trained policy."""
    began = clock(layout)
    job = Run(Inputs(config), layout)
    job.run()
    seconds = clock(layout) - began
    reference = job.models.reference
    if reference is None:  # plain GRPO trains without one
        reference = build_reference(job.inputs.arch, config, layout)
        load_hf(reference, config.model.path)
    return measure(job, reference) | {"seconds": seconds}


def run_warm_start(config: Config, layout: Layout) -> Figures:
    """Make the warm start; its own figures, in the same columns."""
    began = clock(layout)
    steps = warm_start(config, layout)
    seconds = clock(layout) - began
    job = Run(Inputs(config), layout)
    return measure(job, job.models.policy) | {"seconds": seconds, "steps": steps}


def main(path: str) -> int:
    """One rank; the exit code, as that of `flowrl-mega train`."""
    try:
        return run_as_rank(partial(run_trials, json.loads(Path(path).read_text())), Path(path).parent)
    except (ConfigError, RunError) as error:  # of a rank that is alone
        print(f"flowrl-mega: {error}", file=sys.stderr)
        return BAD_INPUT if isinstance(error, ConfigError) else CANNOT_GO_ON


def run_trials(job: dict[str, Any]) -> int:
    trials = [Trial(**trial) for trial in job["trials"]]
    for trial in my_trials(trials) if job["side_by_side"] else trials:
        if not trial.done:
            run(trial, job["overrides"], job["may_diverge"])
    if dist.is_initialized():
        layouts.shutdown()
    return 0


def my_trials(trials: list[Trial]) -> list[Trial]:
    """This rank's trials; from here on it is the only rank of a job of its own (LOCAL_RANK still names its GPU)."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_WORLD_SIZE": "1"}
    return trials[rank::ranks]


def run(trial: Trial, overrides: list[str], may_diverge: bool) -> None:
    """Run it, with `overrides` beside its own, and write its figures; one that `may_diverge` then has a pass rate of 0
    and no figures but that. Collective."""
    config = trial.config(overrides)
    layout = layouts.init(config.parallel, config.seed)
    if layout.rank == 0:
        print(f"\n{trial.name} (seed {trial.seed})", flush=True)
    try:
        figures = run_warm_start(config, layout) if trial.name == "start" else run_trial(config, layout)
    except Diverged as error:
        if not may_diverge:
            raise
        print(f"diverged: {error}", flush=True)
        figures = {"pass_rate": 0.0, "distinct": 0.0, "diverged": 1.0}
    if layout.rank == 0:
        part = trial.file.with_suffix(".partial")
        part.parent.mkdir(parents=True, exist_ok=True)
        part.write_text(json.dumps({"overrides": trial.overrides, "figures": figures}, indent=1))
        part.rename(trial.file)
    dist.barrier()
