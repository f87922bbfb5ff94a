"""Where training should end, in closed form, and what a policy over the enumerated space is worth.

Policies are log-probs of every outcome, [prompts, outcomes] float64; rewards, if not given, are the space's.
Source: arXiv 2509.15207, Eq. 6 at w = 1 with answers drawn from the policy itself. With delta = log Z + (log pi -
log pi_ref) / s - beta r, s = |y| with length normalisation and 1 without, the gradient of E[delta^2] over pi is 0 where
delta / s is the same for every answer:

    log pi*(y) = log pi_ref(y) + s (beta r(y) - log Z + lambda s)       lambda makes the sum over y 1

The best log Z of pi makes E[delta] 0, so where log Z is free, lambda is 0. Without length normalisation log Z and
lambda are one number, and what log Z is changes nothing.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from examples.exact import space


def scales(length_norm: bool) -> Tensor:
    """s, [outcomes] float64."""
    lengths = space.lengths().double()
    return lengths if length_norm else torch.ones_like(lengths)


def free_target(
    ref_logp: Tensor, beta: float, length_norm: bool, rewards: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """(log pi* [prompts, outcomes], log Z [prompts]) where each prompt's log Z is learned (lambda = 0)."""
    gain, s = beta * (space.rewards() if rewards is None else rewards), scales(length_norm)
    log_z = _root(lambda z: -(ref_logp + s * (gain - z[:, None])).logsumexp(1), len(ref_logp))
    return ref_logp + s * (gain - log_z[:, None]), log_z


def fixed_target(ref_logp: Tensor, beta: float, log_z: Tensor, rewards: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(log pi* [prompts, outcomes], lambda [prompts]) where log Z [prompts] is given, with length normalisation.

    lambda has the sign of log Z - c, c the free log Z, and favours longer answers where it is positive.
    """
    gain, s = beta * (space.rewards() if rewards is None else rewards) - log_z[:, None], scales(True)
    slope = _root(lambda x: (ref_logp + s * (gain + x[:, None] * s)).logsumexp(1), len(ref_logp))
    return ref_logp + s * (gain + slope[:, None] * s), slope


def shared_target(ref_logp: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """(log pi* [prompts, outcomes], log Z [prompts], all the same) where one log Z is learned for all prompts, with
    length normalisation: the log Z at which E[delta] = lambda E|y| is 0 in the mean over the prompts."""

    def mean_delta(log_z: Tensor) -> Tensor:
        log_p, slope = fixed_target(ref_logp, beta, log_z.expand(len(ref_logp)))
        return (slope * mean_length(log_p)).mean()[None]

    log_z = _root(mean_delta, 1).expand(len(ref_logp))
    return fixed_target(ref_logp, beta, log_z)[0], log_z


def printed_target(ref_logp: Tensor, beta: float, group: int) -> Tensor:
    """log pi* [prompts, outcomes] of GFlowRL with Z as its Eq. 4 is printed, without 1/|y|, in groups of G answers.

    With L = log pi - log pi_ref, an answer's own term in Z leaves, on average over the others,
    delta = c + (1/|y| - 1/G) L - (1 - 1/G) beta r,   c = (1 - 1/G) E[beta r - L],
    and the gradient is 0 where delta / |y| is the same for every answer. Only for |y| < G is that a pull to pi_ref.
    """
    gain, n, share = beta * space.rewards(), scales(True), 1 - 1 / group
    assert n.max() < group, "answers as long as the group run away from the reference"

    def policy(c: Tensor) -> Tensor:
        def logp(slope: Tensor) -> Tensor:
            return ref_logp + (share * gain - c[:, None] + slope[:, None] * n) / (1 / n - 1 / group)

        return logp(_root(lambda slope: logp(slope).logsumexp(1), len(ref_logp)))

    def excess(c: Tensor) -> Tensor:
        found = policy(c)
        return c - share * (found.exp() * (gain - (found - ref_logp))).sum(1)

    return policy(_root(excess, len(ref_logp)))


def group_target(ref_logp: Tensor, beta: float) -> tuple[Tensor, Tensor] | None:
    """(log pi* [prompts, outcomes], its inverse temperature b [prompts]) for r_hat, without length normalisation.

    r_hat is (r - a constant) / std_pi(r), so the policy can rest only at pi_ref e^{b r} / Z with b std(r) = beta, std
    under that policy itself: the least such b. None where a prompt has none: then r_hat pulls for ever.
    """
    b = torch.arange(0.0, 200.0, 0.01, dtype=torch.float64)
    pull = b * group_spread(ref_logp, b)
    if not bool((pull >= beta).any(1).all()):
        return None
    found = b[(pull >= beta).int().argmax(1)]
    return (ref_logp + found[:, None] * space.rewards()).log_softmax(1), found


def group_spread(ref_logp: Tensor, b: Tensor) -> Tensor:
    """The standard deviation of the reward under pi_ref e^{b r} / Z, [prompts, len(b)]."""
    spread = []
    for logp, r in zip(ref_logp, space.rewards(), strict=True):
        p = (logp + b[:, None] * r).softmax(1)
        spread.append((p @ r.square() - (p @ r).square()).clamp(min=0).sqrt())
    return torch.stack(spread)


def _root(rising: Callable[[Tensor], Tensor], count: int) -> Tensor:
    """Where functions that rise are 0, [count], each looked for between -100 and 100 by halving."""
    low, high = (torch.full((count,), end, dtype=torch.float64) for end in (-100.0, 100.0))
    for _ in range(60):
        middle = (low + high) / 2
        above = rising(middle) > 0
        low, high = torch.where(above, low, middle), torch.where(above, middle, high)
    return middle


def best_log_z(logp: Tensor, ref_logp: Tensor, beta: float, length_norm: bool) -> Tensor:
    """E[beta r - (log pi - log pi_ref) / s], [prompts]: the log Z that minimises E[delta^2] while the policy is pi.

    Without length normalisation it is log Z* - KL(pi || pi*). A group's estimate is its mean over the group's answers.
    """
    return (logp.exp() * residual_at_0(logp, ref_logp, beta, length_norm)).sum(1)


def log_z_variance(logp: Tensor, ref_logp: Tensor, beta: float, length_norm: bool) -> Tensor:
    """The variance of that over the policy's answers, [prompts]: a group's estimate has 1/G of it."""
    values = residual_at_0(logp, ref_logp, beta, length_norm)
    return (logp.exp() * (values - best_log_z(logp, ref_logp, beta, length_norm)[:, None]).square()).sum(1)


def residual_at_0(logp: Tensor, ref_logp: Tensor, beta: float, length_norm: bool) -> Tensor:
    """-delta of every outcome at log Z = 0, [prompts, outcomes]."""
    return beta * space.rewards() - (logp - ref_logp) / scales(length_norm)


def kl(logp: Tensor, log_q: Tensor) -> Tensor:
    """KL(pi || q) of every prompt, nats, [prompts]."""
    return (logp.exp() * (logp - log_q)).sum(1)


def inverse_temperature(logp: Tensor, ref_logp: Tensor, length_norm: bool) -> Tensor:
    """The slope of (log pi - log pi_ref) / s on the reward over the outcomes, drawn from pi: beta at the free target.

    [prompts]. Sharper than a KL, which is quadratic in the error.
    """
    p, y = logp.exp(), (logp - ref_logp) / scales(length_norm)
    r = space.rewards() - (p * space.rewards()).sum(1, keepdim=True)
    return (p * r * y).sum(1) / (p * r * r).sum(1)


def mean_reward(logp: Tensor) -> float:
    """E[r], the mean over the prompts."""
    return float((logp.exp() * space.rewards()).sum(1).mean())


def mean_length(logp: Tensor) -> Tensor:
    """E|y| of every prompt, [prompts]."""
    return (logp.exp() * space.lengths()).sum(1)


def right_answers() -> Tensor:
    """Which outcomes are right, [prompts, outcomes] bool: those of the best fifth of rewards."""
    rewards = space.rewards()
    return rewards >= rewards.quantile(space.RIGHT, dim=1, keepdim=True)


def effective_right_answers(logp: Tensor) -> Tensor:
    """e^entropy of the policy among right answers (renormalised), [prompts]: n where n of them are equally likely."""
    right = right_answers()
    among = logp.masked_fill(~right, -torch.inf).log_softmax(1).masked_fill(~right, 0.0)
    return (-(among.exp() * among * right).sum(1)).exp()


def figures(logp: Tensor, ref_logp: Tensor) -> dict[str, float]:
    """What a policy is worth, means over the prompts."""
    return {
        "reward": mean_reward(logp),
        "right": float((logp.exp() * right_answers()).sum(1).mean()),
        "effective": float(effective_right_answers(logp).mean()),
        "length": float(mean_length(logp).mean()),
        "kl_ref": float(kl(logp, ref_logp).mean()),
    }
