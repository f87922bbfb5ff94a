"""The promise itself: trained by the real trainer on two tensor-parallel ranks, the policy becomes the reward
distribution pi_ref e^{beta r} / Z, and log Z its normaliser; GRPO, beside it, does not.

Sources: the facts that on-policy FlowRL descends KL(pi || pi*), and where it ends with and without 1/|y| (arXiv
2509.15207, Eq. 6, with the raw reward and one update a batch: with r_hat the target would move with the policy).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_pool import RankPool
from torch import Tensor

from examples.exact import space, targets
from examples.exact.job import Trained, rollout, train

pytestmark = [pytest.mark.exact, pytest.mark.ranks, pytest.mark.timeout(1800)]

STEPS, ANSWERS, WATCH = 280, 192, 4
BETA, BETA_PER_TOKEN = 3.0, 1.0  # without and with length normalisation: the same pull at three tokens
FLOWRL = {"name": "flowrl", "beta": BETA, "reward_norm": "none", "weight": "paper", "length_norm": False}
METHODS: dict[str, dict[str, Any]] = {
    "start": FLOWRL,
    "flowrl": FLOWRL,
    "flowrl_norm": FLOWRL | {"beta": BETA_PER_TOKEN, "length_norm": True},
    "grpo": {"name": "grpo"},
    "flowrl_group": FLOWRL | {"z": "group"},
    "gflowrl": {"name": "gflowrl", "beta": BETA_PER_TOKEN},
}
GROUP = 16  # answers a group of GFlowRL: each prompt has several of them in a step
SHORT = 60  # steps of what is watched on its way only
FOUND = 5  # looks, 20 steps, until log Z has come from about 0 to where it belongs
TOLERANCE = 0.02  # of KL (nats) and of log Z


class Runs:
    """Each method's run, made when first asked for: same start, same prompts, as many answers and updates."""

    def __init__(self, pool: RankPool, task: Path) -> None:
        self.pool, self.task, self.done = pool, task, dict[str, Trained]()

    def __getitem__(self, method: str) -> Trained:
        if method not in self.done:
            steps = {"start": 0, "flowrl_group": SHORT}.get(method, STEPS)
            group = GROUP if method.startswith("gflowrl") else ANSWERS
            sections = {"objective": METHODS[method], "rollout": rollout(group, ANSWERS // group)}
            where = (self.task, self.task / method, steps, sections)
            first, second = self.pool.run(train, *where, tp=2, watch=WATCH, timeout=800)
            torch.testing.assert_close(first.logp, second.logp, rtol=0, atol=0)  # both ranks see one policy
            self.done[method] = first
        return self.done[method]


@pytest.fixture(scope="module")
def runs(ranks2: RankPool, task: Path) -> Runs:
    return Runs(ranks2, task)


def row(name: str, run: Trained, log_p: Tensor, log_z: Tensor) -> str:
    """One line of the table: mean and largest KL(pi || pi*), E[r], the largest error of log Z."""
    kl = targets.kl(run.logp, log_p)
    error = f"{largest_error(run.log_z, log_z):14.4f}" if run.log_z is not None else f"{'-':>14}"
    return f"{name:14} {kl.mean():12.4f} {kl.max():12.4f} {targets.mean_reward(run.logp):8.4f} {error}"


def largest_error(log_z: Tensor | None, exact: Tensor) -> float:
    assert log_z is not None, "this run has no partition function"
    return float((log_z - exact).abs().max())


def check_temperature(run: Trained, ref_logp: Tensor, beta: float, length_norm: bool) -> None:
    """A small KL alone does not tell beta from 1.1 beta."""
    measured = float(targets.inverse_temperature(run.logp, ref_logp, length_norm).mean())
    assert abs(measured / beta - 1) < 0.05, f"beta = {beta}, but the policy follows {measured:.3f}"


def report(capsys: pytest.CaptureFixture[str], title: str, rows: list[str]) -> str:
    """Show the table although pytest captures output, and return it for the messages of assertions."""
    head = f"{title:14} {'KL to pi*':>12} {'largest':>12} {'E[r]':>8} {'log Z error':>14}"
    table = "\n".join(["", head, *rows])
    with capsys.disabled():
        print(table)
    return table


def test_every_outcome_is_listed(runs: Runs, ref_logp: Tensor) -> None:
    """All that follows are sums over outcomes: their mass must be 1, and the policy must start as the reference."""
    start = runs["start"].logp
    for logp in (ref_logp, start):
        torch.testing.assert_close(logp.exp().sum(1), torch.ones(3, dtype=torch.float64), rtol=0, atol=1e-6)
    torch.testing.assert_close(start, ref_logp, rtol=0, atol=1e-5)
    log_p, _ = targets.free_target(ref_logp, BETA, False)
    torch.testing.assert_close(log_p, (ref_logp + BETA * space.rewards()).log_softmax(1))
    assert targets.kl(start, log_p).mean() > 10 * TOLERANCE, "a target this near would be met without training"


def test_flowrl_becomes_the_reward_distribution_and_grpo_does_not(
    runs: Runs, ref_logp: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check 2. A policy still off its target biases log Z by -KL(pi || pi*), so the tolerance holds for both."""
    log_p, log_z = targets.free_target(ref_logp, BETA, False)
    table = report(capsys, "exact", [row(name, runs[name], log_p, log_z) for name in ("start", "flowrl", "grpo")])
    flowrl, kl = runs["flowrl"], targets.kl(runs["flowrl"].logp, log_p).mean()
    assert kl < TOLERANCE, table
    assert largest_error(flowrl.log_z, log_z) < TOLERANCE, table
    assert targets.kl(runs["grpo"].logp, log_p).mean() > 10 * max(kl, TOLERANCE), table
    grpo, ours, start = (targets.mean_reward(runs[name].logp) for name in ("grpo", "flowrl", "start"))
    assert grpo > ours > start + 0.1, table
    check_temperature(flowrl, ref_logp, BETA, False)


def test_length_normalised_flowrl_reaches_its_own_target(
    runs: Runs, ref_logp: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """Check 3: with 1/|y| and answers of one to three tokens, pi* = pi_ref e^{|y| (beta r - c)} and log Z is c."""
    log_p, log_z = targets.free_target(ref_logp, BETA_PER_TOKEN, True)
    table = report(capsys, "exact, 1/|y|", [row(name, runs[name], log_p, log_z) for name in ("start", "flowrl_norm")])
    run, kl = runs["flowrl_norm"], targets.kl(runs["flowrl_norm"].logp, log_p).mean()
    assert kl < TOLERANCE, table
    assert largest_error(run.log_z, log_z) < TOLERANCE, table
    check_temperature(run, ref_logp, BETA_PER_TOKEN, True)


def test_gflowrl_reaches_flowrls_target_without_a_partition_function(
    runs: Runs, ref_logp: Tensor, capsys: pytest.CaptureFixture[str]
) -> None:
    """In groups of 16 and with clipped gaps, of which there are fewer and fewer on the way."""
    log_p, log_z = targets.free_target(ref_logp, BETA_PER_TOKEN, True)
    table = report(capsys, "GFlowRL", [row(name, runs[name], log_p, log_z) for name in ("start", "gflowrl")])
    run, kl = runs["gflowrl"], targets.kl(runs["gflowrl"].logp, log_p).mean()
    assert kl < TOLERANCE, table
    check_temperature(run, ref_logp, BETA_PER_TOKEN, True)
    clipped = [line["loss/gap_clipped"] for line in run.metrics]
    assert clipped[0] > 0.3 and sum(clipped[-20:]) / 20 < clipped[0] / 2, (clipped[0], clipped[-1])


@pytest.mark.parametrize("method", ["flowrl", "flowrl_norm"])
def test_the_logged_log_z_is_the_exact_one(runs: Runs, ref_logp: Tensor, method: str) -> None:
    """The number that a user watches in metrics.jsonl is the normaliser, and no update was skipped."""
    settings = METHODS[method]
    _, log_z = targets.free_target(ref_logp, settings["beta"], settings["length_norm"])
    lines = runs[method].metrics
    assert len(lines) == STEPS and lines[-1]["policy/skipped_updates"] == 0
    logged = sum(line["loss/log_z"] for line in lines[-20:]) / 20
    assert abs(logged - float(log_z.mean())) < TOLERANCE, f"logged {logged:.4f}, exact {float(log_z.mean()):.4f}"


@pytest.mark.parametrize("method", ["flowrl", "flowrl_norm"])
def test_what_is_drawn_of_log_z_is_exact(runs: Runs, task: Path, ref_logp: Tensor, method: str) -> None:
    """distributions.jsonl, which the calibration plot is drawn from: log Z of every prompt and its group's estimate;
    and the estimate of KL(pi || pi*) from a step's answers follows the exact one."""
    settings = METHODS[method]
    beta, length_norm = settings["beta"], settings["length_norm"]
    log_p, log_z = targets.free_target(ref_logp, beta, length_norm)
    run = runs[method]
    lines = (task / method / "distributions.jsonl").read_text().splitlines()
    last = json.loads(lines[-1])
    assert last["step"] == STEPS
    for name in ("logged", "group"):
        found = torch.tensor(sorted(last["log_z"][name]), dtype=torch.float64)
        assert (found - log_z.sort().values).abs().max() < 0.05, (name, found, log_z)
    estimates = torch.tensor([run.metrics[n]["target/kl"] for n in run.watched if n < 40])
    exact = torch.stack([targets.kl(logp, log_p).mean() for n, logp in run.watched.items() if n < 40])
    assert (estimates - exact).abs().mean() < 0.25 * exact.mean(), (estimates, exact)


def looks(run: Trained, ref_logp: Tensor, method: str) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """At every look but the last, means over the prompts: log Z as the next step logged it, what its answers estimate
    (log Z less the mean residual), the exact best log Z of the policy, and the estimate's standard error, exactly."""
    settings = METHODS[method]
    beta, length_norm = settings["beta"], settings["length_norm"]
    at = [(run.metrics[n], logp) for n, logp in run.watched.items() if n < len(run.metrics)]
    logged = torch.tensor([line["loss/log_z"] for line, _ in at], dtype=torch.float64)
    residual = torch.tensor([line["loss/residual"] for line, _ in at], dtype=torch.float64)
    best = torch.stack([targets.best_log_z(logp, ref_logp, beta, length_norm).mean() for _, logp in at])
    variance = torch.stack([targets.log_z_variance(logp, ref_logp, beta, length_norm).mean() for _, logp in at])
    return logged, logged - residual, best, (variance / (ANSWERS * len(space.PROMPTS))).sqrt()


@pytest.mark.parametrize("method", ["flowrl", "flowrl_norm"])
def test_log_z_follows_the_exact_best_of_the_policy(runs: Runs, ref_logp: Tensor, method: str) -> None:
    """It is found within a few steps, long before the policy is where it goes: a log Z that only knew the end's value
    would be far off on the way."""
    settings = METHODS[method]
    _, end = targets.free_target(ref_logp, settings["beta"], settings["length_norm"])
    logged, _, best, _ = looks(runs[method], ref_logp, method)
    error, still_to_go = (logged - best).abs()[FOUND:], (end.mean() - best).abs()[FOUND:]
    assert error.mean() < TOLERANCE, f"off by {error.tolist()}"
    on_the_way = still_to_go > TOLERANCE
    assert on_the_way.sum() >= 3, "at every look the policy had arrived"
    assert error[on_the_way].mean() < still_to_go[on_the_way].mean() / 2, f"{error.tolist()} of {still_to_go.tolist()}"


def test_the_best_log_z_is_that_of_the_facts(runs: Runs, ref_logp: Tensor) -> None:
    """Check 2: log Z* - KL(pi || pi*), another formula than the mean residual's, all along the way."""
    log_p, log_z = targets.free_target(ref_logp, BETA, False)
    for logp in runs["flowrl"].watched.values():
        expected = log_z - targets.kl(logp, log_p)
        torch.testing.assert_close(targets.best_log_z(logp, ref_logp, BETA, False), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("method", ["flowrl", "flowrl_norm", "flowrl_group"])
def test_the_groups_estimate_is_the_exact_best_in_expectation(runs: Runs, ref_logp: Tensor, method: str) -> None:
    """Its errors average out, and are as large as the policy's own spread says. With z: group it is what is logged."""
    logged, estimate, best, sigma = looks(runs[method], ref_logp, method)
    z = (estimate - best) / sigma
    mean_error = sigma.square().sum().sqrt() / len(sigma)
    assert mean_error < TOLERANCE / 2, "a bias could not be told from chance"
    assert (estimate - best).mean().abs() < 4 * mean_error, f"{method}: {z.tolist()}"
    assert 0.3 < z.square().mean() < 2.5, f"{method}: {z.tolist()}"
    if method == "flowrl_group":
        torch.testing.assert_close(logged, estimate, rtol=0, atol=1e-6)
