"""From graded answers to scores: avg@k, pass@k, maj@k with intervals over problems, and what else a table must tell."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from itertools import groupby
from math import isnan
from statistics import fmean
from typing import Any

from flowrl_mega.benchmark.answers import Answer
from flowrl_mega.benchmark.samples import Sample
from flowrl_mega.evaluation.diversity import clusters, distinct_n, self_bleu, vendi, vendi_of_texts
from flowrl_mega.evaluation.embeddings import Embed, clusters_of, similarities
from flowrl_mega.evaluation.estimates import interval, maj, pass_at_k, powers


def scores(samples: Sequence[Sample], k: int, slow: bool = False) -> dict[str, Any]:
    """The scores of one benchmark's samples, sorted by problem, with `k` attempts at each; the first k count. `slow`:
    with measures of diversity that compare each answer with the others.

    Intervals are of 95%, over problems. "cut_off", "no_answer", "time_out" and "failed" count answers, all of which
    count as wrong: those that ended at the limit of tokens, gave no final answer, could not be graded in time, or on
    which the grader itself broke.
    """
    by_problem = [list(of)[:k] for _, of in groupby(samples, key=lambda sample: sample.problem)]
    assert all(len(of) == k for of in by_problem), "as many attempts at each problem"
    right = [sum(sample.right for sample in of) for of in by_problem]
    every = [sample for of in by_problem for sample in of]
    found: dict[str, Any] = {"problems": len(by_problem), "k": k}
    found |= _estimate(f"avg@{k}", [count / k for count in right])
    for j in powers(k):
        found |= _estimate(f"pass@{j}", [pass_at_k(k, count, j) for count in right])
    if any(sample.vote is not None for sample in every):
        found |= _estimate(f"maj@{k}", [maj([s.vote for s in of], [s.right for s in of]) for of in by_problem])
    found |= {
        "mean_score": fmean(sample.score for sample in every),
        "cut_off": sum(sample.is_cut_off for sample in every),
        "no_answer": sum(sample.has_no_answer for sample in every),
        "time_out": sum(sample.kind == "time-out" for sample in every),
        "failed": sum(sample.kind == "error" for sample in every),
        "answers": len(every),
        "mean_tokens": _mean(sample.tokens for sample in every),
        "diversity": diversity(by_problem) | (slow_diversity(by_problem) if slow and k > 1 else {}),
    }
    return found


def diversity(by_problem: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """How varied a problem's answers are, means over the problems. Clusters count ways of solving among right answers
    by the equations that they write (`evaluation.diversity.solution_key`), where a problem has any."""
    right = [[sample for sample in of if sample.right] for of in by_problem]
    found = {
        "distinct_answers": fmean(len({s.vote for s in of if s.vote is not None}) for of in by_problem),
        "distinct_right_texts": fmean(len({s.text for s in of}) for of in right),
        "distinct_2": fmean(distinct_n([s.text for s in of], 2) for of in by_problem),
    }
    if solved := [of for of in right if of]:
        found["right_clusters"] = fmean(clusters([s.text for s in of], [s.vote for s in of]) for of in solved)
    return found


def slow_diversity(by_problem: Sequence[Sequence[Sample]]) -> dict[str, float]:
    """Of all of a problem's answers, means over the problems."""
    texts = [[sample.text for sample in of] for of in by_problem]
    return {"vendi": fmean(map(vendi_of_texts, texts)), "self_bleu": fmean(map(self_bleu, texts))}


def diversity_of_meaning(samples: Sequence[Sample], k: int, embed: Embed) -> dict[str, float]:
    """By the embeddings of a problem's answers, means over the problems: the effective number of different answers, and
    the groups of right answers that are alike, where a problem has any."""
    every, alike = [], []
    for _, attempts in groupby(samples, key=lambda sample: sample.problem):
        of = list(attempts)[:k]
        similarity = similarities(embed([sample.text for sample in of]))
        every.append(vendi(similarity))
        right = [at for at, sample in enumerate(of) if sample.right]
        if right:
            alike.append(clusters_of(similarity[right][:, right]))
    found = {"vendi_embeddings": fmean(every)}
    return found | ({"right_clusters_embeddings": fmean(alike)} if alike else {})


def entropy(answers: Iterable[Answer]) -> dict[str, float]:
    """{"entropy": nats per token}: -log pi of what was drawn, whose mean is the policy's entropy where nothing was cut
    off its distribution (top_p = 1). Empty where no log-probs are known."""
    known = [(answer.nats, answer.tokens) for answer in answers if answer.nats is not None and answer.tokens]
    return {"entropy": sum(nats for nats, _ in known) / sum(tokens for _, tokens in known)} if known else {}


def _estimate(name: str, per_problem: list[float]) -> dict[str, Any]:
    low, high = interval(per_problem)
    return {name: fmean(per_problem), f"{name}/interval": None if isnan(low) else [low, high]}


def _mean(numbers: Iterable[int | None]) -> float | None:
    known = [number for number in numbers if number is not None]
    return fmean(known) if known else None


def table(benchmarks: Mapping[str, Mapping[str, Any]]) -> str:
    """The scores of benchmarks by name, as a table of Markdown with their titles, where they have one."""
    every = {of.get("title", name): of for name, of in benchmarks.items()}
    ks = {of["k"] for of in every.values()}
    k = ks.pop()
    assert not ks, "one evaluation has one k"
    names = [f"avg@{k}", *(f"pass@{j}" for j in powers(k)[1:]), f"maj@{k}"]
    counted = {"cut_off": "cut off", "no_answer": "no answer", "time_out": "time-out", "failed": "failed"}
    head = ["benchmark", "problems", *names, *counted.values(), "tokens"]
    lines = [_row(head), _row(["---"] * len(head))]
    for title, of in every.items():
        cells = [
            title,
            str(of["problems"]),
            _with_interval(of, names[0]),
            *(_percent(of.get(name)) for name in names[1:]),
        ]
        cells += [f"{of[name]} of {of['answers']}" if of[name] else "0" for name in counted]
        lines.append(_row([*cells, f"{of['mean_tokens']:.0f}" if of["mean_tokens"] is not None else ""]))
    if len(every) > 1:
        means = [_percent(fmean(of[name] for of in every.values())) if _all_have(every, name) else "" for name in names]
        lines.append(_row(["mean", "", *means, *[""] * (len(counted) + 1)]))
    said = [f"{title}: {_rating(of)}" for title, of in every.items() if "rating" in of]
    said += [f"{title}: {_judged(of['judge'], of['problems'])}" for title, of in every.items() if "judge" in of]
    lines += [line for each in said for line in ("", each)]
    return "\n".join(lines) + "\n"


def _rating(of: Mapping[str, Any]) -> str:
    if of["rating"] is None:
        return f"no rating, as none of the {len(of['left_out'])} contests has participants enough"
    than = f", higher than that of {of['percentile']:.1f}% of humans" if "percentile" in of else ""
    left_out = f"; {len(of['left_out'])} left out, with too few participants" if of["left_out"] else ""
    return f"rating {of['rating']:.2f}{than} ({len(of['contests'])} contests{left_out})"


def _judged(of: Mapping[str, Any], problems: int) -> str:
    mean = "no verdict" if of["mean"] is None else f"diversity {of['mean']:.2f} of 5"
    return f"{mean}, by {of['model']} ({of['no_verdict']} of {problems} problems without a verdict)"


def _all_have(every: Mapping[str, Mapping[str, Any]], name: str) -> bool:
    return all(name in of for of in every.values())


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _percent(share: float | None) -> str:
    return "" if share is None else f"{100 * share:.2f}"


def _with_interval(of: Mapping[str, Any], name: str) -> str:
    found = of[f"{name}/interval"]
    return _percent(of[name]) + (f" ({100 * found[0]:.1f} to {100 * found[1]:.1f})" if found else "")
