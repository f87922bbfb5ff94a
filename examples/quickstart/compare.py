"""The fair comparison: is FlowRL's diversity more than what a KL term gives GRPO?

    python -m examples.quickstart.compare     about 20 minutes on two cores; resumes where it was stopped

On-policy FlowRL with the raw reward has the gradient of beta E[r] - KL(pi || pi_ref): beating GRPO without a KL term
would only show that a reference helps. So GRPO's KL coefficient is swept, with the matched 1 / (beta L) among its
values (L: mean length of the warm start's right answers). Every method gets the same learning rates to choose from, on
a seed of its own; the rule is fixed beforehand: of the rates whose pass rate is within 0.02 of the method's best, the
one with most distinct right answers. Then three other seeds with that rate.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from examples.quickstart.run import run_trials, summarise, table
from flowrl_mega.config_file import load_config
from flowrl_mega.data import sums
from flowrl_mega.monitor.plots import reward_against_diversity

FOLDER = Path("runs/compare")
BETA = 2
RATES = (5e-4, 1e-3)
TUNING_SEED, SEEDS = 100, (0, 1, 2)
NEAR_BEST = 0.02
# At a constant rate; the quick start lets its own decay.
COMMON = ["optimizer.decay=constant", "monitor.progress=false", "evaluation.every=0"]


def main() -> int:
    methods = all_methods()
    code = run_trials(
        FOLDER / f"seed_{TUNING_SEED}",
        TUNING_SEED,
        {trial(name, rate): [*overrides, *at(rate)] for name, overrides in methods.items() for rate in RATES},
    )
    if code:
        return code
    tuning = read(TUNING_SEED)
    rates = {name: best_rate(name, tuning) for name in methods}
    for seed in SEEDS:
        trials = {name: [*overrides, *at(rates[name])] for name, overrides in methods.items()}
        if code := run_trials(FOLDER / f"seed_{seed}", seed, trials):
            return code
    summary = summarise([read(seed) for seed in SEEDS])
    report = {"methods": summary, "rates": rates, "seeds": list(SEEDS), "tuning": tuning}
    (FOLDER / "compare.json").write_text(json.dumps(report, indent=1))
    reward_against_diversity({k: v for k, v in summary.items() if k != "start"}, FOLDER / "compare.png")
    print(f"\nchosen learning rates: {rates}\n\n{table(summary)}\n\n{FOLDER}/compare.json, {FOLDER}/compare.png")
    return 0


def all_methods() -> dict[str, list[str]]:
    """Every method and its overrides of quickstart.yaml, but for the learning rate."""
    config = load_config(Path(__file__).with_name("quickstart.yaml"))
    matched = round(1 / (BETA * mean_length(config.data.task_args)), 4)
    sweep = sorted({0.01, 0.05, matched, 0.2})
    names = {c: f"grpo_kl {c:g}" + (" (matched)" if c == matched else "") for c in sweep}
    return {
        "flowrl": [f"objective={{name: flowrl, beta: {BETA}, reward_norm: none}}"],
        "grpo": ["objective={name: grpo}"],
        **{names[c]: [f"objective={{name: grpo, kl_coef: {c}}}"] for c in sweep},
    }


def mean_length(task_args: dict[str, Any]) -> float:
    """Tokens of a right answer with its end token, averaged over prompts and answers (the demonstrations' mean)."""
    prompts = [row["right_answers"] for row in sums.rows(**task_args)]
    return sum(sum(len(answer) + 1 for answer in right) / len(right) for right in prompts) / len(prompts)


def at(rate: float) -> list[str]:
    return [f"optimizer.lr={rate}", *COMMON]


def trial(name: str, rate: float) -> str:
    return f"{name} lr {rate:g}"


def best_rate(name: str, tuning: dict[str, Any]) -> float:
    """The rule of the module's docstring."""
    figures = {rate: tuning[trial(name, rate)] for rate in RATES}
    best = max(row["pass_rate"] for row in figures.values())
    near = [rate for rate, row in figures.items() if row["pass_rate"] >= best - NEAR_BEST]
    return max(near, key=lambda rate: figures[rate]["distinct"])


def read(seed: int) -> dict[str, Any]:
    return json.loads((FOLDER / f"seed_{seed}" / "results.json").read_text())


if __name__ == "__main__":
    sys.exit(main())
