"""Exact figures where right answers can be listed: probabilities by teacher forcing, nothing is sampled.

With p(y) = pi(y|x), y ending in the stop token, over a prompt's right answers:
    pass rate = sum p(y)        pass@k = 1 - (1 - pass rate)^k        distinct@k = sum 1 - (1 - p(y))^k
    coverage  = distinct@k / min(k, number of right answers)
"""

from __future__ import annotations

from collections.abc import Sequence as Seq

import torch
from torch import Tensor

from flowrl_mega.model.policy import Policy
from flowrl_mega.parallel.packing import Sequence, plan


def sequence_logp(policy: Policy, sequences: list[Sequence], temperature: float, budget: int) -> Tensor:
    """log pi(y|x) [N] float64 by `Sequence.index` (0..N-1), on every rank."""
    layout = policy.layout
    total = torch.zeros(len(sequences), dtype=torch.float64, device=layout.device)
    (batches,) = plan(sequences, len(sequences), layout, budget)
    for batch, output in zip(batches, policy.score(batches, temperature), strict=layout.is_last_stage):
        owner = batch.index.repeat_interleave(batch.response_cu_seqlens.diff())
        total.index_add_(0, owner, output.logp.double())
    return layout.dp_sum_to_all_stages(total)


def right_answer_probabilities(
    policy: Policy, prompts: Seq[list[int]], answers: Seq[Seq[list[int]]], temperature: float = 1.0, budget: int = 16384
) -> list[Tensor]:
    """For each prompt, pi(y|x) of its right answers (token ids with the stop token), [number of answers] float64."""
    pairs = [(prompt, answer) for prompt, right in zip(prompts, answers, strict=True) for answer in right]
    sequences = [Sequence(i, prompt, answer) for i, (prompt, answer) in enumerate(pairs)]
    probabilities = sequence_logp(policy, sequences, temperature, budget).exp().cpu()
    return list(probabilities.split([len(right) for right in answers]))


def exact_metrics(probabilities: Seq[Tensor], k: int) -> dict[str, float]:
    """Means over the prompts of the figures above."""
    columns: dict[str, list[float]] = {"pass_rate": [], f"pass@{k}": [], "distinct": [], "coverage": []}
    for p in probabilities:
        passed = float(p.sum().clamp(max=1.0))
        distinct = float((1 - (1 - p).clamp(min=0) ** k).sum())
        columns["pass_rate"].append(passed)
        columns[f"pass@{k}"].append(1 - (1 - passed) ** k)
        columns["distinct"].append(distinct)
        columns["coverage"].append(distinct / min(k, p.numel()))
    return {name: sum(values) / len(values) for name, values in columns.items()}


def spread_metrics(
    policy: Policy, reference: Policy, sequences: list[Sequence], temperature: float, budget: int = 16384
) -> dict[str, float]:
    """Entropy of whole answers and KL(policy || reference), nats an answer, from answers that the policy has drawn.

    The sum over a drawn answer of each token's exact entropy has the answer's entropy as its mean (chain rule).
    """
    layout = policy.layout
    sums = torch.zeros(2, dtype=torch.float64, device=layout.device)
    (batches,) = plan(sequences, len(sequences), layout, budget)
    for ours, theirs in zip(policy.score(batches, temperature), reference.score(batches, temperature), strict=True):
        sums += torch.stack([ours.entropy.double().sum(), (ours.logp.double() - theirs.logp.double()).sum()])
    entropy, kl = (layout.dp_sum_to_all_stages(sums) / len(sequences)).tolist()
    return {"entropy": entropy, "kl": kl}
