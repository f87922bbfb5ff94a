"""The runs of the table: every objective and every FlowRL variant, and the policy that each one's figures are held
against."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from examples.exact import space, targets
from examples.exact.job import COMMON, rollout

BETA, BETA_PER_TOKEN = 3.0, 1.0  # without and with length normalisation: the same pull at three tokens
BETA_GROUP = 0.5  # of r_hat: small enough for it to come to rest
ANSWERS, STEPS = 96, 280
CONSTANT_LR = 0.02  # Adam moves a single number by its rate a step at most: 5e-4 would take it nowhere in 280
UPDATES, STEPS_OF_UPDATES = 4, 140  # where a step has several updates
MATCHED = 1 / BETA  # the coefficient of a KL whose optimum is the target of BETA

PRINTED = 16  # answers a group where GFlowRL's Z is as printed
ASKED, FEW = 4096, 16  # of the reference, for a frozen log Z that is nearly exact, and for one that is not
AHEAD = 8  # steps, by which answers are older than the step that learns from them
MIRROR, UPDATES_OF_MIRROR = 3, 200  # steps and updates of one, with pi_old as reference: each step comes to its end

# A target's short name in the table, and what it is.
TARGETS = {
    "A": f"pi_ref e^(beta r) / Z with beta {BETA:g}: FlowRL without length normalisation, and the optimum of "
    f"E[r] - KL(pi, pi_ref) / {BETA:g}",
    "B": f"pi_ref e^(|y| (beta r - c)) with beta {BETA_PER_TOKEN:g}: FlowRL with 1/|y|; c, the best log Z, makes it 1",
    "B0": "as B, but log Z is held at 0: pi_ref e^(|y| (beta r + lambda |y|)), lambda makes it 1",
    "B1": "as B, but one log Z serves all prompts",
    "P": f"GFlowRL's with beta {BETA_PER_TOKEN:g}, G {PRINTED}, and Z as printed, without 1/|y|",
    "G": f"pi_ref e^(b r) / Z with b std(r) = beta {BETA_GROUP:g} under this policy itself: where r_hat can rest",
}


def target(name: str, ref_logp: Tensor) -> tuple[Tensor, Tensor | None]:
    """(log pi* [prompts, outcomes], log Z [prompts]) of a name in TARGETS; None where log Z has no fixed value."""
    if name == "A":
        return targets.free_target(ref_logp, BETA, length_norm=False)
    if name == "B":
        return targets.free_target(ref_logp, BETA_PER_TOKEN, length_norm=True)
    if name == "B0":
        return targets.fixed_target(ref_logp, BETA_PER_TOKEN, torch.zeros(len(space.PROMPTS)).double())[0], None
    if name == "B1":
        return targets.shared_target(ref_logp, BETA_PER_TOKEN)
    if name == "P":
        return targets.printed_target(ref_logp, BETA_PER_TOKEN, PRINTED), None
    found = targets.group_target(ref_logp, BETA_GROUP)
    assert found is not None, f"r_hat has no fixed point at beta {BETA_GROUP}"
    return found[0], None


@dataclass(frozen=True)
class Row:
    """One run: its settings, and the target it is measured against. `own`: that is where it should end."""

    title: str
    objective: Mapping[str, Any]
    target: str = "A"
    own: bool = True
    updates: int = 1
    critic: Mapping[str, Any] | None = None
    steps: int = STEPS
    log_z_lr: float | None = None  # another than that of all rows
    answers: int = ANSWERS  # to a prompt in a step
    group: int = ANSWERS  # of them in a group
    ahead: int = 0  # steps

    @property
    def sections(self) -> dict[str, Any]:
        """The row's settings, over those that all rows share."""
        sections: dict[str, Any] = {
            "objective": dict(self.objective),
            "rollout": rollout(self.group, self.answers // self.group),
        }
        if self.ahead:
            sections["rollout"] |= {"ahead": self.ahead}
        if self.critic is not None:
            sections["critic"] = dict(self.critic)
        if self.log_z_lr is not None:
            sections["optimizer"] = COMMON["optimizer"] | {"log_z_lr": self.log_z_lr}
        if self.updates > 1:
            sections["batch"] = {"mini_batch": len(space.PROMPTS) * self.answers // self.updates}
        return sections

    @property
    def beta(self) -> float | None:
        """FlowRL's, where the reward is the raw one."""
        return self.objective["beta"] if self.objective.get("reward_norm") == "none" else None

    @property
    def length_norm(self) -> bool:
        return bool(self.objective.get("length_norm", True))


PLAIN = {"name": "flowrl", "beta": BETA, "reward_norm": "none", "length_norm": False}
PER_TOKEN = PLAIN | {"beta": BETA_PER_TOKEN, "length_norm": True}
DROPOUT = {"z_dropout": 0.1, "z_prompt": "drop-last"}
Z = {
    "mlp": ("Z mlp", {}),
    "mlp-detached": ("Z mlp-detached", {"z": "mlp-detached"}),
    "dropout": ("Z mlp, dropout 0.1, drop-last", DROPOUT),
    "constant": ("Z constant", {"z": "constant"}),
    "zero": ("Z zero", {"z": "zero"}),
    "group": ("Z group", {"z": "group"}),
    "group-loo": ("Z group, leave one out", {"z": "group", "z_leave_one_out": True}),
    "frozen": (f"Z frozen, of {ASKED} answers", {"z": "frozen", "z_answers": ASKED}),
    "tis": ("Z mlp, tis sum", {"tis": "sum"}),
}
WEIGHTS = ("paper", "released", "max10", "asym", "cap", "gspo", "none")
GFLOWRL = {"name": "gflowrl", "beta": BETA_PER_TOKEN}
NO_CLIP = {"clip_gap": False}
GROUPS = (4, 8, 16)
SEVERAL = {"updates": UPDATES, "steps": STEPS_OF_UPDATES}
MIRRORED = PLAIN | {"z": "group", "reference": "old"}
CRITIC = {"trunk": "own", "optimizer": {"lr": 1e-3, "weight_decay": 0.0}}
GRPO = {"name": "grpo"}
TOKEN = {"loss_mean": "token"}
NO_STD = {"name": "grpo", "std": False, **TOKEN}
PPO = {"name": "ppo"}
IN_LOSS = {"kl_in": "loss", "kl_coef": MATCHED, "kl_estimator": "k2"}
REINFORCE = {"name": "reinforce_pp"}


def _others() -> dict[str, Row]:
    """What does not match rewards, or does so by a KL term."""
    return {
        "grpo": Row("GRPO", GRPO, own=False),
        "grpo-token": Row("GRPO, token mean", GRPO | TOKEN, own=False),
        "grpo-no-std": Row("GRPO, no std", GRPO | {"std": False}, own=False),
        "grpo-no-std-token": Row("GRPO, no std, token mean", NO_STD, own=False),
        "grpo-kl": Row("GRPO, KL 1/3 (k3)", GRPO | {"kl_coef": MATCHED}, own=False),
        **{
            f"grpo-no-std-token-{k}": Row(
                f"GRPO, no std, token mean, KL 1/3 ({k})",
                NO_STD | {"kl_coef": MATCHED, "kl_estimator": k},
                own=False,
            )
            for k in ("k1", "k2", "k3")
        },
        "gspo": Row("GSPO", {"name": "gspo"}, own=False),
        "reinforce_pp": Row("REINFORCE++", REINFORCE, own=False),
        "reinforce_pp-kl": Row("REINFORCE++, token KL 1/3", REINFORCE | {"kl_coef": MATCHED} | TOKEN),
        "cispo": Row("CISPO", {"name": "cispo"}, own=False),
        "rloo": Row("RLOO", {"name": "rloo"}, own=False),
        "rloo-kl": Row("RLOO, KL 1/3 in the reward", {"name": "rloo", "kl_coef": MATCHED}),
        "ppo": Row("PPO", PPO, own=False, critic=CRITIC),
        "ppo-kl": Row("PPO, KL 1/3 in the reward", PPO | {"kl_in": "reward", "kl_coef": MATCHED}, critic=CRITIC),
        "ppo-kl-loss": Row("PPO, KL 1/3 in the loss (k2)", PPO | IN_LOSS, own=False, critic=CRITIC),
        "ppo-kl-loss-plain": Row(
            "PPO, advantages as they are, KL 1/3 in the loss (k2)",
            PPO | IN_LOSS | {"normalise": False},
            own=False,
            critic=CRITIC,
        ),
    }


def _constant(objective: Mapping[str, Any], target: str) -> Row:
    """One learned number, at a rate of its own."""
    title = f"Z constant, its rate {CONSTANT_LR:g}"
    return Row(title, {**objective, "z": "constant"}, target, log_z_lr=CONSTANT_LR)


def _per_token_target(z: str) -> str:
    return {"zero": "B0", "constant": "B1"}.get(z, "B")


TABLES: dict[str, dict[str, Row]] = {
    "Other objectives": {"start": Row("start", PLAIN, own=False, steps=0), **_others()},
    "FlowRL without length normalisation": {
        **{f"plain-{key}": Row(title, PLAIN | change) for key, (title, change) in Z.items()},
        "plain-constant-fast": _constant(PLAIN, "A"),
        "plain-r_hat": Row("Z mlp, r_hat", PLAIN | {"reward_norm": "group"}, own=False),
        "plain-r_hat-small": Row(
            f"Z mlp, r_hat, beta {BETA_GROUP:g}", PLAIN | {"reward_norm": "group", "beta": BETA_GROUP}, "G"
        ),
    },
    "FlowRL with 1/|y|": {
        **{f"norm-{key}": Row(title, PER_TOKEN | change, _per_token_target(key)) for key, (title, change) in Z.items()},
        "norm-constant-fast": _constant(PER_TOKEN, "B1"),
        "norm-frozen-few": Row(
            f"Z frozen, of {FEW} answers", PER_TOKEN | {"z": "frozen", "z_answers": FEW}, "B", own=False
        ),
        "norm-r_hat": Row("Z mlp, r_hat", PER_TOKEN | {"reward_norm": "group"}, "B", own=False),
        "paper": Row("the paper's: r_hat, beta 15", {"name": "flowrl"}, "B", own=False),
    },
    "GFlowRL": {
        **{f"gflowrl-{g}": Row(f"G {g}", GFLOWRL, "B", group=g) for g in GROUPS},
        **{f"gflowrl-{g}-no-clip": Row(f"G {g}, no gap clip", GFLOWRL | NO_CLIP, "B", group=g) for g in GROUPS},
        "gflowrl-printed": Row(
            f"G {PRINTED}, no gap clip, Z as printed", GFLOWRL | NO_CLIP | {"z_as_printed": True}, "P", group=PRINTED
        ),
        "gflowrl-16-updates": Row(f"G 16, {UPDATES} updates a step", GFLOWRL, "B", group=16, **SEVERAL),
        "norm-clip": Row("FlowRL, Z mlp, gap clip", PER_TOKEN | {"clip_gap": True}, "B", own=False),
        "norm-random": Row("FlowRL, Z drawn from N(0.5, 1)", PER_TOKEN | {"z": "random"}, "B", own=False),
        "norm-mirror": Row(
            "FlowRL, Z group, pi_old as reference", PER_TOKEN | {"z": "group", "reference": "old"}, "B", own=False
        ),
        "mirror-steps": Row(
            f"the same, not per token: {MIRROR} steps of {UPDATES_OF_MIRROR} updates, beta {BETA / MIRROR:g}",
            MIRRORED | {"beta": BETA / MIRROR},
            updates=UPDATES_OF_MIRROR,
            steps=MIRROR,
            answers=ANSWERS * UPDATES_OF_MIRROR,
        ),
    },
    f"Answers {AHEAD} steps old": {
        "gflowrl-16-stale": Row("GFlowRL, G 16", GFLOWRL, "B", group=16, ahead=AHEAD),
        "gflowrl-16-no-clip-stale": Row("GFlowRL, G 16, no gap clip", GFLOWRL | NO_CLIP, "B", group=16, ahead=AHEAD),
        "norm-mlp-stale": Row("FlowRL, Z mlp", PER_TOKEN, "B", ahead=AHEAD),
        "norm-frozen-stale": Row(
            f"FlowRL, Z frozen, of {ASKED} answers", PER_TOKEN | {"z": "frozen", "z_answers": ASKED}, "B", ahead=AHEAD
        ),
    },
    f"FlowRL's weights, {UPDATES} updates a step": {
        "grpo-4": Row("GRPO", GRPO, own=False, **SEVERAL),
        **{f"plain-w-{w}": Row(f"w {w}", PLAIN | {"weight": w}, **SEVERAL) for w in WEIGHTS},
        **{f"norm-w-{w}": Row(f"w {w}, 1/|y|", PER_TOKEN | {"weight": w}, "B", **SEVERAL) for w in WEIGHTS},
    },
}
ROWS: dict[str, Row] = {key: row for rows in TABLES.values() for key, row in rows.items()}
assert len(ROWS) == sum(map(len, TABLES.values())), "two rows of one name"
