"""FlowRL: trajectory balance against the reward distribution pi_ref e^{beta r} / Z.

Source: "FlowRL: Matching Reward Distributions for LLM Reasoning", arXiv 2509.15207, Eq. 6-7:

    delta = log Z_phi(x) + (1/|y|) log pi_theta(y|x) - beta r_hat - (1/|y|) log pi_ref(y|x)
    w     = clip(pi_theta(y|x) / pi_old(y|x), 1 - eps, 1 + eps), detached
    L     = mean over sequences of w delta^2

The residual is a gap, which the policy that wrote the answer leaves, and what pi_theta has done since:

    delta = gap + (1/|y|) log(pi_theta(y|x) / pi_old(y|x)),   gap = log Z + (1/|y|) log(pi_old / pi_ref)(y|x) - beta r

`clip_gap` keeps the gap in [-eps, eps_high], as GFlowRL (arXiv 2607.13394, Eq. 8) does.
"""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from typing import ClassVar, Literal, NamedTuple, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor

from flowrl_mega.config import LogZ, LogZKind
from flowrl_mega.metrics import FromMeans, GroupGap, Max, Mean, Metric
from flowrl_mega.objectives.base import (
    LossOutput,
    Objective,
    SumOverReplicas,
    effective_sample_size,
    group_normalise,
    group_sums,
    mismatch_metrics,
)
from flowrl_mega.objectives.inputs import LossInputs
from flowrl_mega.settings import Needs

Weight = Literal["paper", "released", "max10", "asym", "cap", "gspo", "none"]


class FlowTerms(NamedTuple):
    """The terms of the loss, each [B] float64."""

    loss: Tensor  # w delta^2, with gradient
    delta: Tensor  # the residual, with gradient
    weight: Tensor  # w, detached
    clipped: Tensor  # 1.0 where w is not the ratio pi_theta / pi_old itself, else 0.0
    gap_clipped: Tensor  # 1.0 where the gap was beyond its bounds, else 0.0


def trajectory_weight(
    sum_d: Tensor, length: Tensor, weight: Weight, eps: float, eps_high: float = 0.28
) -> tuple[Tensor, Tensor]:
    """w and where it was clipped, both [B] without gradient, from sum_d [B] = log pi_theta(y|x) - log pi_old(y|x).

    paper: clip(e^sum_d, 1 - eps, 1 + eps), Eq. 7.  released: e^sum_d, the authors' first release.  max10:
    min(e^sum_d, 10), their later one.  asym, gspo (their branches): clip(r, 1 - eps, 1 + eps_high) of r = e^sum_d, or
    of r = e^(sum_d / |y|), the ratio of the mean token.  cap (GFlowRL): min(e^sum_d, 1 + eps_high), without a floor, so
    that answers which the policy has left stop counting.  none: 1.
    """
    # Detached: with gradient, w would add delta^2 grad w, and the fixed point would no longer be the target.
    sum_d = sum_d.detach()
    ratio = (sum_d / length if weight == "gspo" else sum_d).exp()
    if weight == "none":
        return torch.ones_like(ratio), torch.zeros_like(ratio)
    low, high = {
        "paper": (1 - eps, 1 + eps),
        "released": (None, None),
        "max10": (None, 10.0),
        "asym": (1 - eps, 1 + eps_high),
        "cap": (None, 1 + eps_high),
        "gspo": (1 - eps, 1 + eps_high),
    }[weight]
    w = ratio if low is None and high is None else ratio.clamp(low, high)
    return w, (w != ratio).to(ratio.dtype)


def flowrl_loss(
    log_z: Tensor | float,
    sum_logp: Tensor,
    sum_ref_logp: Tensor,
    sum_d: Tensor,
    length: Tensor,
    credit: Tensor,
    *,
    beta: float,
    weight: Weight = "paper",
    eps: float = 0.2,
    eps_high: float = 0.28,
    length_norm: bool = True,
    clip_gap: bool = False,
) -> FlowTerms:
    """FlowRL's loss per sequence (Eq. 6-7) from per-sequence sums, all [B]: delta^2 is not linear in the sums, so
    whoever splits a sequence over ranks adds its parts up first.

    log_z: log Z_phi(x), or 0.  sum_logp, sum_ref_logp: log pi_theta(y|x), log pi_ref(y|x).
    sum_d: sum over tokens of log pi_theta - log pi_old.  length: |y|.  credit: r_hat, or the raw reward.
    The residual uses token means (sums without length_norm); the weight uses the token sum, the ratio of whole
    trajectories, but for `gspo`. With `clip_gap` log Z has a gradient where its gap is inside the bounds.
    """
    scale = length if length_norm else 1
    delta = log_z + sum_logp / scale - beta * credit - sum_ref_logp / scale
    gap_clipped = torch.zeros_like(delta, requires_grad=False)
    if clip_gap:
        gap = delta - sum_d / scale
        bounded = gap.clamp(-eps, eps_high)
        delta, gap_clipped = bounded + sum_d / scale, (bounded != gap).to(delta.dtype)
    w, clipped = trajectory_weight(sum_d, length, weight, eps, eps_high)
    return FlowTerms(w * delta.square(), delta, w, clipped, gap_clipped)


def random_log_z(key: Tensor) -> Tensor:
    """A draw from N(0.5, 1) for each prompt, [G] float64, from the bits of a number that all replicas have, [G].

    Equal on all replicas and in a resumed run, and another one in each step. Source: the ablation of GFlowRL.
    """
    draws = [random.Random(value).gauss(0.5, 1.0) for value in key.double().view(torch.int64).tolist()]
    return torch.tensor(draws, dtype=torch.float64, device=key.device)


def log_z_of_reference(rewards: Tensor, scales: Tensor, beta: float) -> Tensor:
    """The root c of mean exp(s (beta r - c)) = 1 over the reference's answers to each prompt, [P] float64.

    rewards, scales [P, N]: r and s of its answers; s = |y| with length normalisation, and 1 without, where c is
    log mean exp(beta r). With it pi_ref e^{s (beta r - c)} has the mass 1, as those answers estimate the mass.
    """
    gain, count = beta * rewards.double(), math.log(rewards.shape[1])
    low, high = gain.amin(1), gain.amax(1)  # there no term is below 1, here none above
    for _ in range(64):
        c = (low + high) / 2
        is_low = (scales * (gain - c[:, None])).logsumexp(1) > count
        low, high = torch.where(is_low, c, low), torch.where(is_low, high, c)
    return (low + high) / 2


class FlowBalance(Objective):
    """Base of the objectives that balance flow: settings and loss. A subclass brings `z`, `log_z` and `credit`."""

    NEEDS: ClassVar[tuple[Needs, ...]] = (
        *Objective.NEEDS,
        Needs(
            "eps",
            "objective.weight = paper, asym or gspo, or objective.clip_gap",
            lambda o: o.weight in ("paper", "asym", "gspo") or o.clip_gap,
        ),
        Needs(
            "eps_high",
            "objective.weight = asym, cap or gspo, or objective.clip_gap",
            lambda o: o.weight in ("asym", "cap", "gspo") or o.clip_gap,
        ),
    )

    beta: float = Field(15.0, ge=0, allow_inf_nan=False, description="inverse temperature; short answers want less")
    z_leave_one_out: bool = Field(False, description="an answer's own term stays out of its group's estimate")
    weight: Weight = Field("paper", description="w: the ratio clipped, as it is, at most 10, ...; none: 1")
    clip_gap: bool = Field(False, description="what pi_old leaves of the residual is kept in [-eps, eps_high]")
    reference: Literal["frozen", "old"] = Field(
        "frozen", description="pi_ref: model.path as it was, or pi_old (a mirror step each, with no model to keep)"
    )
    # The paper gives no eps; 0.2 is the clip_ratio of the released scripts, and 0.2 / 0.28 the recipe's.
    eps: float = Field(0.2, ge=0, lt=1, description="the weights paper, asym and gspo are at least 1 - eps")
    eps_high: float = Field(0.28, ge=0, allow_inf_nan=False, description="asym, cap and gspo are at most 1 + eps_high")
    length_norm: bool = Field(True, description="token means in the residual; false: sums over the response")
    # w is the weight of a whole answer, and so is what multiplies it: L = mean of tis w delta^2.
    tis: Literal["none", "sum", "mean"] = Field(
        "none", description="weight pi_old / pi_rollout of the answer, or of its mean token"
    )

    @property
    @abstractmethod
    def log_z_kind(self) -> LogZKind:
        """Which partition function the model has."""

    @property
    def log_z(self) -> LogZ:
        return LogZ(kind=self.log_z_kind)

    @property
    def needs_reference(self) -> bool:
        return self.reference == "frozen"

    @property
    def needs_old_logp(self) -> bool:
        return self.log_z_kind in ("group", "random")

    @torch.no_grad()
    def prepare(
        self, batches: list[LossInputs], sum_over_replicas: SumOverReplicas, groups: int
    ) -> list[dict[str, Tensor]]:
        """With z: group, "log_z" [B]: the mean over the prompt's answers of beta credit - mean_logp + mean_ref_logp,
        the log Z that makes their residuals 0 on average, from pi_old. With z: random a draw in its place."""
        if self.log_z_kind not in ("group", "random"):
            return super().prepare(batches, sum_over_replicas, groups)
        estimates = [self._own_estimate(s, s.old_logp) for s in batches]
        sums = group_sums(batches, estimates, groups, sum_over_replicas)
        if self.log_z_kind == "random":
            drawn = random_log_z(sums[0])
            return [{"log_z": drawn[s.group]} for s in batches]
        prepared = []
        for s, own in zip(batches, estimates, strict=True):
            summed, count = sums[:, s.group]
            if self.z_leave_one_out:  # an answer without others has no estimate: 0
                summed, count = summed - own, (count - 1).clamp(min=1)
            prepared.append({"log_z": summed / count})
        return prepared

    def _own_estimate(self, s: LossInputs, logp: Tensor) -> Tensor:
        """[B] the log Z that makes each residual 0 where the policy has the log-probs `logp` [T]."""
        log_ratio = s.sum(logp) - s.sum(self.ref_logp(s))
        return self.beta * s.credit.double() - log_ratio / (s.length if self.length_norm else 1)

    def _log_z_of(self, s: LossInputs) -> Tensor:
        """[B] float64."""
        is_given = self.log_z.learned or self.log_z_kind == "frozen"
        assert (s.log_z is not None) == is_given, f"z={self.log_z_kind}, but log_z is {s.log_z}"
        if s.log_z is not None:
            return s.log_z.double()
        fixed = torch.zeros_like(s.credit, dtype=torch.float64)
        return s.prepared["log_z"] if self.log_z_kind in ("group", "random") else fixed

    def ref_logp(self, s: LossInputs) -> Tensor:
        """[T] log pi_ref(y_t)."""
        if self.reference == "old":
            return s.old_logp.detach()
        assert s.ref_logp is not None, "FlowRL needs the reference's log-probs"
        return s.ref_logp

    def loss(self, s: LossInputs) -> LossOutput:
        log_z = self._log_z_of(s)
        sum_logp, sum_ref_logp, sum_d = s.sum(s.logp), s.sum(self.ref_logp(s)), s.sum(s.log_ratio())
        terms = flowrl_loss(
            log_z,
            sum_logp,
            sum_ref_logp,
            sum_d,
            s.length,
            s.credit.double(),
            beta=self.beta,
            weight=self.weight,
            eps=self.eps,
            eps_high=self.eps_high,
            length_norm=self.length_norm,
            clip_gap=self.clip_gap,
        )
        scale = s.length.double() if self.length_norm else torch.ones_like(log_z)
        own_log_z = self.beta * s.credit.double() - ((sum_logp - sum_ref_logp) / scale).detach()
        tis_weight, tis_metrics = self.tis_weight(s)
        metrics: dict[str, Metric] = {
            "loss/residual": Mean(terms.delta),
            "loss/residual_sq": Mean(terms.delta.square()),
            "loss/flow_weight": Mean(terms.weight),
            "loss/log_z": Mean(log_z),
            "policy/clip_fraction": Mean(terms.clipped),
            "policy/weight_sample_size": FromMeans(
                effective_sample_size, Mean(terms.weight), Mean(terms.weight.square())
            ),
            "policy/mean_logp": Mean(sum_logp / s.length),
            "policy/mean_log_ratio_to_ref": Mean((sum_logp - sum_ref_logp) / s.length),
            "policy/max_abs_log_ratio": Max(sum_d.abs()),
            **tis_metrics,
            **mismatch_metrics(s),
        }
        if self.clip_gap:
            metrics["loss/gap_clipped"] = Mean(terms.gap_clipped)
        if s.groups and self.log_z_kind not in ("group", "random"):
            assert s.group is not None, "the prompts' groups must be known"
            gap = log_z - self._own_estimate(s, s.logp)
            metrics["loss/log_z_gap"] = GroupGap(gap, s.group, s.groups)
        if s.rollout_logp is not None:
            # The residual with the engine's log-probs is delta - shift: the change is (delta - shift)^2 - delta^2.
            shift = s.sum(s.mismatch()) / (s.length if self.length_norm else 1)
            metrics["mismatch/residual_sq_change"] = Mean(shift * (shift - 2 * terms.delta))
        answers = {"residual": log_z.detach() - own_log_z, "log_z": log_z.detach(), "scale": scale}
        loss = tis_weight * terms.loss
        return LossOutput(loss.sum(), len(s.credit), metrics, answers)


class FlowRL(FlowBalance):
    """Settings of FlowRL; the defaults are the paper's."""

    NEEDS: ClassVar[tuple[Needs, ...]] = (
        *FlowBalance.NEEDS,
        Needs("z_prompt z_dropout", "objective.z = mlp or mlp-detached", lambda o: o.z in ("mlp", "mlp-detached")),
        Needs("z_leave_one_out", "objective.z = group", lambda o: o.z == "group"),
        Needs("z_answers", "objective.z = frozen", lambda o: o.z == "frozen"),
    )

    name: Literal["flowrl"] = "flowrl"
    z: LogZKind = Field(
        "mlp",
        description="log Z: of the prompt's hidden states (detached: without gradient into them), fixed at 0, one "
        "learned scalar, the group's own estimate, drawn from N(0.5, 1) for each prompt (to compare with), or frozen: "
        "estimated once, from the reference's answers",
    )
    z_answers: int = Field(16, ge=1, description="the reference's answers to each prompt that log Z is estimated from")
    z_prompt: Literal["all", "drop-last"] = Field("all", description="prompt tokens that mlp reads; drop-last: but one")
    z_dropout: float = Field(0.0, ge=0, lt=1, description="dropout in mlp, while training")
    reward_norm: Literal["group", "none"] = Field("group", description="credit: r_hat of the group, or the raw reward")

    @model_validator(mode="after")
    def _frozen_stays_true(self) -> Self:
        if self.z == "frozen" and self.reward_norm == "group":
            raise ValueError(
                "z = frozen estimates log Z of the raw reward once, and reward_norm = group (r_hat) changes with the "
                "policy; set objective.reward_norm=none"
            )
        if self.z == "frozen" and self.reference == "old":
            raise ValueError(
                "z = frozen is log Z of the reference that the run starts from, and reference = old changes it each "
                "step; set objective.reference=frozen, or objective.z=group"
            )
        return self

    @property
    def log_z_kind(self) -> LogZKind:
        return self.z

    @property
    def log_z(self) -> LogZ:
        return LogZ(kind=self.z, prompt=self.z_prompt, dropout=self.z_dropout)

    @property
    def reference_answers(self) -> int:
        return self.z_answers if self.z == "frozen" else 0

    def frozen_log_z(self, rewards: Tensor, lengths: Tensor) -> Tensor:
        return log_z_of_reference(rewards, lengths if self.length_norm else torch.ones_like(lengths), self.beta)

    def credit(self, rewards: Tensor, group: Tensor) -> Tensor:
        """r_hat [N], or the raw reward: only the raw one has a target that stays put while the policy moves."""
        return group_normalise(rewards, group) if self.reward_norm == "group" else rewards.double()
