"""GSPO against arXiv 2507.18071 in NumPy."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy_oracles import assert_loss, split, surrogate
from torch.autograd import gradcheck

from flowrl_mega.objectives import GRPO, GSPO, LossInputs

LENGTHS = (3, 1, 7, 2, 5, 9, 1, 4)


def gspo_numpy(s, o):
    """Mean loss, d loss / d logp [T] and metrics (Eq. 5-7): one ratio an answer, the geometric mean of its tokens'."""
    loss, gradient, metrics = 0.0, [], []
    for logp, old, a in zip(split(s, s.logp), split(s, s.old_logp), s.credit.tolist(), strict=True):
        n = len(logp)
        value, slope, clipped = surrogate(logp.sum() / n, old.sum() / n, a, o.clip_eps, o.clip_eps_high)
        loss += value / len(LENGTHS)
        gradient += [slope / n / len(LENGTHS)] * n  # d s / d logp_t = s / |y|
        ratio = np.prod(np.exp(logp - old)) ** (1 / n)
        metrics.append((a, ratio, clipped, logp.mean(), abs((logp - old).sum())))
    names = ["loss/advantage", "policy/ratio", "policy/clip_fraction", "policy/mean_logp", "policy/max_abs_log_ratio"]
    return loss, np.array(gradient), dict(zip(names, np.array(metrics).T, strict=True))


@pytest.mark.parametrize(
    ("drift", "clip"), [(0.6, {"clip_eps": 0.2, "clip_eps_high": 0.28}), (1e-3, {}), (1e-3, {"clip_eps_high": 1e-3})]
)
def test_gspo_equals_numpy(packed, drift, clip):
    """Loss, gradient and metrics, at the paper's clip (3e-4 and 4e-4) and at one as wide as GRPO's."""
    objective = GSPO(**clip)
    s = packed(lengths=LENGTHS, drift=drift, log_z=False, reference=False)
    expected = gspo_numpy(s, objective)
    out = objective.loss(s)
    assert out.count == len(LENGTHS) and 0 < expected[2]["policy/clip_fraction"].mean() < 1
    assert_loss(out, s, *expected)


def test_all_tokens_of_an_answer_share_one_ratio(packed):
    """What sets it apart from GRPO (section 4.2): the gradient weighs the tokens of an answer alike, however unlike
    their own ratios are, and a clipped answer is clipped as a whole."""
    s = packed(lengths=LENGTHS, drift=0.6, log_z=False, reference=False)
    GSPO(clip_eps=0.1, clip_eps_high=0.1).loss(s).loss_sum.backward()
    for slopes in split(s, s.logp.grad):
        np.testing.assert_allclose(slopes, slopes[0], rtol=1e-12)


def test_answers_of_one_token_are_grpos(packed):
    """With one token there is one ratio: the two objectives must meet."""
    s = packed(lengths=(1,) * 20, drift=0.6, log_z=False, reference=False)
    one, other = GSPO(clip_eps=0.2, clip_eps_high=0.28).loss(s), GRPO(clip_eps=0.2, clip_eps_high=0.28).loss(s)
    torch.testing.assert_close(one.loss_sum, other.loss_sum)


def test_gradient_by_finite_differences(packed):
    s = packed(lengths=LENGTHS, log_z=False, reference=False)
    objective = GSPO(clip_eps=0.1, clip_eps_high=0.1)
    assert gradcheck(lambda p: objective.loss(replace(s, logp=p)).loss_sum, (s.logp,))


def test_long_answers_stay_finite():
    """8192 tokens that drifted by a nat each: the mean is 1, where the ratio of the answer would be e^8192."""
    logp = torch.full((8192,), -1.0, dtype=torch.float64, requires_grad=True)
    s = LossInputs(logp, logp.detach() - 1, None, None, torch.tensor([0, 8192]), torch.tensor([-1.0]))
    out = GSPO().loss(s)
    out.loss_sum.backward()
    assert out.metrics["policy/ratio"].values.item() == pytest.approx(np.e) and s.logp.grad.isfinite().all()
