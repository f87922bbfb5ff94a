"""What a step's answers say of the distribution that is matched: residuals, log Z, target against policy, diversity.

The answers y_1 .. y_G to a prompt are drawn from the policy pi, and the target is where the residual delta is 0 with
the log Z that belongs to it: with s = |y|, or 1 without length normalisation,

    log pi*(y) - log pi(y) = -s (delta(y) - shift),

where shift is what log Z is off by. Only with it is pi* a distribution, and with 1/|y| a log Z that is too great would
make long answers worth too little. E_pi[pi* / pi] = 1, so shift makes the mean over a group 1, and

    omega_i = exp(-s_i (delta_i - shift)) / G

is what the target gives to each of these answers, where the policy's own draw gives 1 / G. Of a group is told

    KL(pi || pi*) ~ mean(s (delta - shift)),   total variation ~ sum |omega - 1/G| / 2,
    share of a sample that is worth anything ~ 1 / (G sum omega^2)

log Z is held against the group's own estimate, the one with which its residuals are 0 on average, and against the exact
value where the prompt's row has one ("log_z").
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, fields
from statistics import fmean
from typing import Any

import numpy as np

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
BINS = 40
PROMPTS = 2  # of a record, with all of their answers
MOST_TEXT = 200  # characters of an answer in a record
MOST_NEWTON, NEWTON_ENDS = 60, 1e-12  # steps, and nats of the last


@dataclass(frozen=True)
class Watched:
    """A prompt with its G answers. `said`: what each answer comes to, by which answers are the same."""

    prompt: str
    said: list[str]
    rewards: list[float]
    right: list[bool]
    lengths: list[int]  # tokens
    kind: str | None = None  # of the task
    exact_log_z: float | None = None


@dataclass(frozen=True)
class Residuals:
    """Of a step's first update, one number for each of its N answers; nan for answers of later updates."""

    residual: np.ndarray  # with the gap as it is, clipped or not
    log_z: np.ndarray
    scale: np.ndarray  # s

    @classmethod
    def of_columns(cls, columns: Mapping[str, np.ndarray]) -> Residuals | None:
        """None where the objective has no residual."""
        names = [field.name for field in fields(cls)]
        return cls(**{name: columns[name] for name in names}) if set(names) <= columns.keys() else None

    def of(self, group: int, size: int) -> Residuals:
        part = slice(group * size, (group + 1) * size)
        return Residuals(self.residual[part], self.log_z[part], self.scale[part])


def log_ratio(r: Residuals) -> np.ndarray:
    """log pi* - log pi of every answer, [G]; the mean of its exponential is 1."""
    g = len(r.scale)
    shift = float((r.residual + math.log(g) / r.scale).min())  # here the mean is at least 1
    for _ in range(MOST_NEWTON):
        found = r.scale * (shift - r.residual)
        most = found.max()
        weights = np.exp(found - most)
        # log mean exp is convex in the shift and rises by min(s) at least: Newton comes down to its zero.
        step = (most + math.log(weights.mean())) * weights.sum() / (weights @ r.scale)
        shift -= step
        if step * r.scale.max() < NEWTON_ENDS:
            break
    ratio: np.ndarray = r.scale * (shift - r.residual)
    return ratio


def target_of(r: Residuals) -> np.ndarray:
    """omega, [G]."""
    weights: np.ndarray = np.exp(log_ratio(r))
    return weights / weights.sum()


def kl_to_target(r: Residuals) -> float:
    return -float(log_ratio(r).mean())


def metrics(
    groups: Sequence[Watched], residuals: Residuals | None, entropy: np.ndarray | None = None
) -> dict[str, float]:
    """Of one step, for its line of metrics.jsonl. entropy: of each answer, the mean of its tokens, nan where it is not
    known."""
    found = diversity(groups) | by_kind(groups, entropy)
    return found | of_residuals(groups, residuals) if residuals is not None else found


def diversity(groups: Sequence[Watched]) -> dict[str, float]:
    """Means over the prompts: different answers, different right ones, and the entropy of how often each came."""
    return {
        "diversity/distinct_answers": fmean(len(set(of.said)) for of in groups),
        "diversity/distinct_right": fmean(
            len({said for said, right in zip(of.said, of.right, strict=True) if right}) for of in groups
        ),
        "diversity/answer_entropy": fmean(_entropy(of.said) for of in groups),
    }


def _entropy(said: Sequence[str]) -> float:
    shares = [count / len(said) for count in Counter(said).values()]
    return -sum(share * math.log(share) for share in shares)


def by_kind(groups: Sequence[Watched], entropy: np.ndarray | None) -> dict[str, float]:
    """Reward, length and entropy by the task's kind, where the step has several."""
    kinds: dict[str, list[int]] = {}
    for place, of in enumerate(groups):
        kinds.setdefault(of.kind or "none", []).append(place)
    if len(kinds) < 2:
        return {}
    found = {}
    for kind, places in sorted(kinds.items()):
        found[f"kind/{kind}/reward"] = fmean(reward for place in places for reward in groups[place].rewards)
        found[f"kind/{kind}/length"] = fmean(length for place in places for length in groups[place].lengths)
        if entropy is not None:
            mine = entropy.reshape(len(groups), -1)[places]
            if not np.isnan(mine).all():
                found[f"kind/{kind}/entropy"] = float(np.nanmean(mine))
    return found


def of_residuals(groups: Sequence[Watched], residuals: Residuals) -> dict[str, float]:
    """Quantiles over the answers of the first update, and means over the prompts that have all of theirs in it."""
    known = residuals.residual[~np.isnan(residuals.residual)]
    if not len(known):
        return {}
    found = {
        f"loss/residual_p{round(100 * q):02d}": float(value)
        for q, value in zip(QUANTILES, np.quantile(known, QUANTILES), strict=True)
    }
    whole = list(_whole(groups, residuals))
    if not whole:
        return found
    targets = [target_of(r) for _, r in whole]
    found |= {
        "target/kl": fmean(kl_to_target(r) for _, r in whole),
        "target/total_variation": fmean(float(np.abs(w - 1 / len(w)).sum()) / 2 for w in targets),
        "target/sample_size": fmean(1 / (len(w) * float((w * w).sum())) for w in targets),
    }
    exact = [abs(float(r.log_z.mean()) - of.exact_log_z) for of, r in whole if of.exact_log_z is not None]
    return found | ({"loss/log_z_error": fmean(exact)} if exact else {})


def record(groups: Sequence[Watched], residuals: Residuals | None) -> dict[str, Any]:
    """Of one step, for distributions.jsonl: what a figure cannot say."""
    if residuals is None or np.isnan(residuals.residual).all():
        return {"prompts": [_bars(of, None) for of in groups[:PROMPTS]]}
    known = residuals.residual[~np.isnan(residuals.residual)]
    counts, edges = np.histogram(known, BINS)
    whole = list(_whole(groups, residuals))
    return {
        "residual": {
            "edges": _rounded(edges),
            "counts": counts.tolist(),
            "quantiles": dict(zip(map(str, QUANTILES), _rounded(np.quantile(known, QUANTILES)), strict=True)),
        },
        "log_z": {
            "logged": _rounded([float(r.log_z.mean()) for _, r in whole]),
            "group": _rounded([float((r.log_z - r.residual).mean()) for _, r in whole]),
            "exact": [of.exact_log_z for of, _ in whole],
        },
        "prompts": [_bars(of, target_of(r)) for of, r in whole[:PROMPTS]],
    }


def _whole(groups: Sequence[Watched], residuals: Residuals) -> Iterable[tuple[Watched, Residuals]]:
    """The prompts all of whose answers are in the first update."""
    for number, of in enumerate(groups):
        r = residuals.of(number, len(of.said))
        if not np.isnan(r.residual).any():
            yield of, r


def _bars(of: Watched, target: np.ndarray | None) -> dict[str, Any]:
    """A prompt with its different answers, the most frequent first."""
    places: dict[str, list[int]] = {}
    for i, said in enumerate(of.said):
        places.setdefault(said, []).append(i)
    answers = []
    for said, at in sorted(places.items(), key=lambda item: -len(item[1])):
        answer = {"text": said[:MOST_TEXT], "count": len(at), "reward": fmean(of.rewards[i] for i in at)}
        answer["empirical"] = round(len(at) / len(of.said), 6)
        if target is not None:
            answer["target"] = round(float(target[at].sum()), 6)
        answers.append(answer)
    return {"prompt": of.prompt[-MOST_TEXT:], "answers": answers}


def _rounded(values: Iterable[float]) -> list[float]:
    return [round(float(value), 6) for value in values]
