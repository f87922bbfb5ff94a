"""Metric names of metrics.jsonl, in groups, and the flat names that earlier versions wrote in their place.

The part before the slash is the group, by which wandb arranges its panels:
    loss/               what is minimised, and its terms
    policy/, critic/    the model that learns, and its optimizer
    reward/, verdict/   scores of the step's answers, and their number by kind
    rollout/            how answers were generated
    target/             the step's answers against the distribution that is matched
    diversity/, kind/   how the answers to a prompt differ; reward and length by the kind of task
    mismatch/, fp8/     engine against trainer, and FP8 against bf16
    perf/               seconds, rates, memory and traffic
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

# Old name -> new name, for metrics.jsonl alone: evaluation.jsonl and samples.jsonl have kept theirs.
RENAMED = {
    "loss": "loss/policy",
    "critic/loss": "loss/critic",
    "residual": "loss/residual",
    "delta_sq": "loss/residual_sq",
    "weight": "loss/flow_weight",
    "log_z": "loss/log_z",
    "advantage": "loss/advantage",
    "mean_logp": "policy/mean_logp",
    "mean_logratio": "policy/mean_log_ratio_to_ref",
    "kl": "policy/kl_to_ref",
    "entropy": "policy/entropy",
    "ratio": "policy/ratio",
    "clip_fraction": "policy/clip_fraction",
    "max_abs_sum_d": "policy/max_abs_log_ratio",
    "grad_norm": "policy/grad_norm",
    "lr": "policy/lr",
    "skipped_updates": "policy/skipped_updates",
    "value": "critic/value",
    "return": "critic/return",
    "explained_variance": "critic/explained_variance",
    "value_clip_fraction": "critic/value_clip_fraction",
    "reward": "reward/mean",
    "reward_failed": "reward/failed",
    "response_length": "rollout/response_length",
    "stopped": "rollout/stopped",
    "mismatch_abs_logp": "mismatch/abs_logp_diff",
    "max_mismatch": "mismatch/max_abs_logp_diff",
    "mismatch_kl": "mismatch/kl",
    "mismatch_delta_sq": "mismatch/residual_sq_change",
    "effective_sample_size": "mismatch/effective_sample_size",
    "tis_weight": "mismatch/tis_weight",
    "tis_clipped": "mismatch/tis_clipped",
    "staleness": "mismatch/staleness",
    "max_staleness": "mismatch/max_staleness",
    "fp8_sum_logp_diff": "fp8/sum_logp_diff",
    "fp8_delta_diff": "fp8/residual_diff",
    "fp8_log_z_diff": "fp8/log_z_diff",
    "seconds/generate": "perf/generate_seconds",
    "seconds/reward": "perf/reward_seconds",
    "seconds/score": "perf/score_seconds",
    "seconds/update": "perf/update_seconds",
    "seconds/sync": "perf/sync_seconds",
    "seconds/step": "perf/step_seconds",
    "tokens_per_second": "perf/tokens_per_second",
    "generated_tokens_per_second": "perf/generated_tokens_per_second",
    "memory_gb": "perf/memory_gb",
    "packing_efficiency": "perf/packing_efficiency",
    "sync_seconds": "perf/push_seconds",  # of the weights to servers, a part of the phase perf/sync_seconds
    "sync_gb": "perf/push_gb",
}


def renamed(record: Mapping[str, Any]) -> dict[str, Any]:
    """A line of metrics.jsonl with each old name replaced by the new one, in the same order."""
    return {RENAMED.get(name, name): value for name, value in record.items()}


def is_measured(name: str) -> bool:
    """Whether a metric (by its new name) measures the machine, so that it differs between two equal runs."""
    return name.startswith("perf/") and name.endswith(("_seconds", "_per_second", "memory_gb", "mfu"))
