"""The exact table without its training: closed forms where FlowRL's own gradient must vanish, rows that the settings
accept, and a command that goes on where it was stopped."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor
from torch.autograd import grad

from examples.exact import page, space, table, targets
from examples.exact.job import COMMON
from examples.exact.rows import BETA, BETA_GROUP, BETA_PER_TOKEN, ROWS, TARGETS
from flowrl_mega import objectives
from flowrl_mega.config import Config
from flowrl_mega.objectives.flowrl import flowrl_loss
from flowrl_mega.settings import validated


@pytest.fixture(scope="module")
def ref_logp() -> Tensor:
    """Any distribution over the outcomes will do here, and needs no model."""
    generator = torch.Generator().manual_seed(0)
    shape = (len(space.PROMPTS), len(space.outcomes()))
    return torch.randn(shape, generator=generator, dtype=torch.float64).log_softmax(1)


def gradients(
    log_p: Tensor, ref_logp: Tensor, log_z: Tensor, credit: Tensor, beta: float, length_norm: bool
) -> list[Tensor]:
    """Of E[delta^2], answers drawn from the policy, over its logits (one an outcome) and log Z [prompts]."""
    logits, log_z = log_p.detach().clone().requires_grad_(), log_z.clone().requires_grad_()
    logp = logits.log_softmax(1)
    total = torch.zeros((), dtype=torch.float64)
    for i in range(len(logp)):
        zero = torch.zeros_like(logp[i])
        terms = flowrl_loss(
            log_z[i], logp[i], ref_logp[i], zero, space.lengths(), credit[i], beta=beta, length_norm=length_norm
        )
        total = total + (logp[i].detach().exp() * terms.loss).sum()
    return list(grad(total, [logits, log_z]))


@pytest.mark.parametrize(("beta", "length_norm"), [(BETA, False), (BETA_PER_TOKEN, True)])
def test_a_free_log_z_has_nothing_left_to_learn(ref_logp: Tensor, beta: float, length_norm: bool) -> None:
    log_p, log_z = targets.free_target(ref_logp, beta, length_norm)
    for gradient in gradients(log_p, ref_logp, log_z, space.rewards(), beta, length_norm):
        assert gradient.abs().max() < 1e-12


@pytest.mark.parametrize("group", [4, 16])
def test_z_as_printed_rests_where_its_target_says(ref_logp: Tensor, group: int) -> None:
    """The mean gradient over the group's other answers, by the objective's own loss, one answer after the other; and
    FlowRL's target is no place of rest for it."""
    beta, lengths, rewards = BETA_PER_TOKEN, space.lengths(), space.rewards()
    log_p = targets.printed_target(ref_logp, beta, group)
    torch.testing.assert_close(log_p.logsumexp(1), torch.zeros(3).double(), rtol=0, atol=1e-9)

    def gradient(end: Tensor) -> float:
        worst = 0.0
        for i in range(len(end)):
            own = beta * rewards[i] - (end[i] - ref_logp[i])  # what an answer puts into Z
            z = own / group + (1 - 1 / group) * (end[i].exp() * own).sum()
            logits = end[i].clone().requires_grad_()
            logp, zero = logits.log_softmax(0), torch.zeros_like(end[i])
            terms = flowrl_loss(z, logp, ref_logp[i], zero, lengths, rewards[i], beta=beta, weight="none")
            worst = max(worst, float(grad((end[i].exp() * terms.loss).sum(), logits)[0].abs().max()))
        return worst

    assert gradient(log_p) < 1e-9
    assert gradient(targets.free_target(ref_logp, beta, True)[0]) > 1e-3


@pytest.mark.parametrize("fixed", [-1.0, 0.0, 1.5])
def test_a_fixed_log_z_moves_the_target_along_the_length(ref_logp: Tensor, fixed: float) -> None:
    """The policy rests where the module's docstring says; lambda has the sign of log Z - c, and so has the length."""
    given = torch.full((len(ref_logp),), fixed, dtype=torch.float64)
    log_p, slope = targets.fixed_target(ref_logp, BETA_PER_TOKEN, given)
    torch.testing.assert_close(log_p.logsumexp(1), torch.zeros(3).double(), rtol=0, atol=1e-12)
    policy, _ = gradients(log_p, ref_logp, given, space.rewards(), BETA_PER_TOKEN, True)
    assert policy.abs().max() < 1e-12
    free, c = targets.free_target(ref_logp, BETA_PER_TOKEN, True)
    longer = targets.mean_length(log_p) - targets.mean_length(free)
    assert torch.equal(slope.sign(), (given - c).sign()) and torch.equal(longer.sign(), slope.sign())


def test_a_shared_log_z_is_best_for_all_prompts_together(ref_logp: Tensor) -> None:
    log_p, log_z = targets.shared_target(ref_logp, BETA_PER_TOKEN)
    policy, over_z = gradients(log_p, ref_logp, log_z, space.rewards(), BETA_PER_TOKEN, True)
    assert policy.abs().max() < 1e-12 and abs(over_z.sum()) < 1e-12 and over_z.abs().max() > 1e-3


def test_r_hat_rests_where_its_own_spread_says(ref_logp: Tensor) -> None:
    found = targets.group_target(ref_logp, BETA_GROUP)
    assert found is not None
    log_p, _ = found
    p, r = log_p.exp(), space.rewards()
    mean = (p * r).sum(1, keepdim=True)
    r_hat = (r - mean) / (p * (r - mean).square()).sum(1, keepdim=True).sqrt()
    policy, _ = gradients(log_p, ref_logp, torch.zeros(3).double(), r_hat, BETA_GROUP, False)
    start, _ = gradients(ref_logp, ref_logp, torch.zeros(3).double(), r_hat, BETA_GROUP, False)
    assert policy.abs().max() < 0.01 * start.abs().max()  # b is known to 0.01
    assert targets.group_target(ref_logp, 50.0) is None, "there the pull never ends"


def test_effective_right_answers_counts_those_that_are_equally_likely() -> None:
    right = targets.right_answers()
    assert right.sum(1).tolist() == [17, 17, 17]
    evenly = torch.full(right.shape, 1 / 85, dtype=torch.float64).log()
    torch.testing.assert_close(targets.effective_right_answers(evenly), torch.full((3,), 17.0).double())
    one = torch.where(space.rewards() == space.rewards().amax(1, keepdim=True), 0.0, -50.0).double().log_softmax(1)
    torch.testing.assert_close(targets.effective_right_answers(one), torch.ones(3).double())


@pytest.mark.parametrize("key", ROWS)
def test_a_rows_settings_are_accepted(key: str) -> None:
    """Found now, and not in the tenth minute of the command."""
    row = ROWS[key]
    tree = {"run_dir": "x", "steps": 1, "model": {"path": "x"}, "data": {"path": "x"}, **COMMON, **row.sections}
    objective = objectives.build(validated(Config, tree, "").objective)
    assert objective.needs_critic == ("critic" in row.sections) and row.target in TARGETS


def test_only_a_result_of_the_same_settings_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(table, "FOLDER", tmp_path)
    assert table.stored("grpo", 0) is None
    found = {"settings": table.settings(ROWS["grpo"], 0), "steps": ROWS["grpo"].steps, "figures": {}}
    table.file("grpo", 0).parent.mkdir()
    table.file("grpo", 0).write_text(json.dumps(found))
    assert table.stored("grpo", 0) == found and table.stored("grpo", 1) is None
    table.file("grpo", 0).write_text(json.dumps(found | {"steps": 1}))
    assert table.stored("grpo", 0) is None


def test_the_page_keeps_its_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(page, "PAGE", tmp_path / "page.md")
    page.PAGE.write_text(f"before\n\n{page.BEGIN}\nold\n{page.END}\n\nafter\n")
    page.write("new")
    assert page.PAGE.read_text() == f"before\n\n{page.BEGIN}\n\nnew\n\n{page.END}\n\nafter\n"
