"""Equations of the papers in NumPy, a sequence and a token at a time: what the tests hold the objectives against."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import torch

from flowrl_mega.metrics import FromMeans, Max


def split(s, values):
    """Packed values [T] as arrays, one a sequence."""
    return [values.detach().double().numpy()[a:b] for a, b in pairwise(s.cu_seqlens.tolist())]


def flowrl_numpy(s, o):
    """Loss, d loss / d logp [T] and d loss / d log_z [B] of FlowRL (Eq. 6-7, and the weights of the authors' releases),
    and its metrics."""
    loss, d_logp, d_z, metrics = 0.0, [], [], []
    log_z = torch.zeros(len(s.credit)) if s.log_z is None else s.log_z
    columns = split(s, s.logp), split(s, s.old_logp), split(s, s.ref_logp), log_z.tolist(), s.credit.tolist()
    for logp, old, ref, z, credit in zip(*columns, strict=True):
        n = len(logp) if o.length_norm else 1
        gap = z + old.sum() / n - o.beta * credit - ref.sum() / n
        bounded = min(max(gap, -o.eps), o.eps_high) if o.clip_gap else gap
        delta = bounded + (logp - old).sum() / n
        ratio = np.exp((logp - old).mean() if o.weight == "gspo" else (logp - old).sum())
        low, high = {
            "paper": (1 - o.eps, 1 + o.eps),
            "released": (0, np.inf),
            "max10": (0, 10),
            "asym": (1 - o.eps, 1 + o.eps_high),
            "cap": (0, 1 + o.eps_high),
            "gspo": (1 - o.eps, 1 + o.eps_high),
            "none": (1, 1),
        }[o.weight]
        w = min(max(ratio, low), high)
        clipped = float(w != ratio) if o.weight != "none" else 0.0
        loss += w * delta**2
        d_logp += [2 * w * delta / n] * len(logp)
        d_z.append(2 * w * delta * (bounded == gap))
        drift = abs((logp - old).sum())
        metrics.append((delta, delta**2, w, clipped, z, logp.mean(), (logp - ref).mean(), drift, bounded != gap))
    names = ["loss/residual", "loss/residual_sq", "loss/flow_weight", "policy/clip_fraction", "loss/log_z"]
    names += ["policy/mean_logp", "policy/mean_log_ratio_to_ref", "policy/max_abs_log_ratio"]
    named = dict(zip([*names, "loss/gap_clipped"], np.array(metrics).T, strict=True))
    named["policy/weight_sample_size"] = np.array([named["loss/flow_weight"], named["loss/flow_weight"] ** 2])
    if not o.clip_gap:
        del named["loss/gap_clipped"]
    return loss, np.array(d_logp), np.array(d_z), named


def surrogate(logp, old, a, low, high):
    """-min(rho A, clip(rho, 1 - low, 1 + high) A) from two log-probs, its slope in the first, and whether the clip is
    what the min chose. Source: arXiv 1707.06347, Eq. 7."""
    ratio = math.exp(logp - old)
    clipped = ratio > 1 + high if a > 0 else ratio < 1 - low
    if clipped:
        return -a * (1 + high if a > 0 else 1 - low), 0.0, True
    return -ratio * a, -ratio * a, False


def kl(logp, ref, estimator):
    """Of one token, and its slope in log pi. Source: Schulman, "Approximating KL divergence", 2020."""
    x = ref - logp
    return {"k1": (-x, 1.0), "k2": (x * x / 2, -x), "k3": (math.exp(x) - 1 - x, 1 - math.exp(x))}[estimator]


def policy_gradient(s, advantage, o, kl_in_loss):
    """The mean loss of clipped policy gradients with advantages of tokens (one list a sequence), its gradient [T], and
    the metrics of each answer."""
    high = o.clip_eps if o.clip_eps_high is None else o.clip_eps_high
    logps, olds = split(s, s.logp), split(s, s.old_logp)
    refs = split(s, s.ref_logp) if o.kl_coef else logps
    tokens = sum(len(y) for y in logps)
    loss, gradient, metrics = 0.0, [], []
    for logp, old, ref, a in zip(logps, olds, refs, advantage, strict=True):
        weight = 1 / tokens if o.loss_mean == "token" else 1 / (len(logps) * len(logp))
        terms = np.array([surrogate(*token, o.clip_eps, high) for token in zip(logp, old, a, strict=True)])
        kls = np.array([kl(*token, o.kl_estimator) for token in zip(logp, ref, strict=True)])
        coef = o.kl_coef if kl_in_loss else 0.0
        loss += weight * (terms[:, 0] + coef * kls[:, 0]).sum()
        gradient += list(weight * (terms[:, 1] + coef * kls[:, 1]))
        drift = abs(sum(logp - old))
        ratio = np.exp(logp - old).mean()
        metrics.append((np.mean(a), ratio, terms[:, 2].mean(), logp.mean(), drift, kls[:, 0].mean()))
    names = ["loss/advantage", "policy/ratio", "policy/clip_fraction"]
    names += ["policy/mean_logp", "policy/max_abs_log_ratio", "policy/kl_to_ref"]
    named = dict(zip(names, np.array(metrics).T, strict=True))
    if not o.kl_coef:
        del named["policy/kl_to_ref"]
    return loss, np.array(gradient), named


def normalised(advantage):
    """Lists of tokens to mean 0 and variance 1 over all of them; unbiased, with verl's and OpenRLHF's 1e-8."""
    tokens = np.concatenate(advantage)
    return [(a - tokens.mean()) / math.sqrt(tokens.var(ddof=1) + 1e-8) for a in advantage]


def assert_loss(out, s, loss, gradient, metrics):
    """Mean loss, gradient in the log-probs and metrics of a LossOutput, to rounding."""
    mean = out.loss_sum / out.count
    mean.backward()
    np.testing.assert_allclose(mean.item(), loss, rtol=1e-12, atol=1e-14)
    np.testing.assert_allclose(s.logp.grad, gradient, rtol=1e-12, atol=1e-15)
    assert_metrics(out, metrics)


def assert_metrics(out, expected):
    assert out.metrics.keys() == expected.keys()
    for name, metric in out.metrics.items():
        assert isinstance(metric, Max) == ("max_" in name), name
        np.testing.assert_allclose(values_of(metric), expected[name], rtol=1e-12, atol=1e-12, err_msg=name)


def values_of(metric):
    """The values [B] of a metric of one micro-batch, or [means, B] of those that its figure is made of."""
    if isinstance(metric, FromMeans):
        return np.array([values_of(mean) for mean in metric.means])
    assert metric.values.dtype == torch.float64 and not metric.values.requires_grad
    return metric.values.numpy()
