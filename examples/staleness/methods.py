"""The methods that are compared on stale answers, and where they are compared.

All take the raw reward, beta 2 where they have one, and the matched KL coefficient 1 / (beta L) where they have that, L
the mean length of a right answer: then flow balance and the matched policy gradients have one target. Every ratio is
against the policy that wrote the answers, but where a title says otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from examples.compare import BETA, CRITIC, mean_length

TOTALS = {"lo": 10, "hi": 99}  # the quick start's task


@dataclass(frozen=True)
class Method:
    """`overrides` of quickstart.yaml. With fresh answers and one update a step all ratios are 1, and some methods are
    one run: `fresh` names the one whose run it is there."""

    overrides: list[str]
    fresh: str | None = None


def all_methods(kl: float) -> dict[str, Method]:
    """name -> method. kl: the matched coefficient."""
    flowrl = f"name: flowrl, beta: {BETA}, reward_norm: none"
    rloo = f"name: rloo, kl_coef: {kl}"
    found: dict[str, Method] = {}
    for z in ("mlp", "group"):
        for clip in (False, True):
            shared = f"flowrl, z {z}, {'gap clip, ' * clip}w paper"
            for weight in ("paper", "max10", "none"):
                name = shared.replace("paper", weight)
                settings = f"{flowrl}, z: {z}, weight: {weight}" + ", clip_gap: true" * clip
                found[name] = Method([f"objective={{{settings}}}"], None if name == shared else shared)
    gflowrl = f"name: gflowrl, beta: {BETA}"
    found |= {
        "gflowrl": Method([f"objective={{{gflowrl}}}"], "flowrl, z group, gap clip, w paper"),
        "gflowrl, no gap clip": Method([f"objective={{{gflowrl}, clip_gap: false}}"], "flowrl, z group, w paper"),
        "rloo, matched KL, PPO clip": Method([f"objective={{{rloo}}}"]),
        "rloo, matched KL, sequence weight": Method(
            [f"objective={{{rloo}, old: trainer, tis: sum}}"], "rloo, matched KL, PPO clip"
        ),
        "rloo, matched KL, decoupled": Method(
            [f"objective={{{rloo}, old: decoupled, tis: token}}"], "rloo, matched KL, PPO clip"
        ),
        "grpo, no std, matched KL (k2)": matched_grpo(kl),
        "grpo": Method(["objective={name: grpo}"]),
        "cispo": Method(["objective={name: cispo}"]),
        "gspo": Method(["objective={name: gspo, clip_eps: 0.03, clip_eps_high: 0.04}"], "grpo"),
        "ppo, matched KL": Method([f"objective={{name: ppo, kl_coef: {kl}}}", CRITIC]),
    }
    return found


def matched_grpo(kl: float) -> Method:
    return Method([f"objective={{name: grpo, std: false, kl_coef: {kl}, kl_estimator: k2}}"])


def left_out() -> dict[str, Method]:
    """FlowRL as of the paper's weight, and with one thing of it left out or changed at a time."""
    flowrl = f"name: flowrl, beta: {BETA}, reward_norm: none"
    cap = f"{flowrl}, weight: cap"  # the ratio, at most 1.28: paper's without its floor
    whole = Method([f"objective={{{flowrl}}}"])
    return {
        "flowrl, w paper": whole,
        "flowrl, no floor": Method([f"objective={{{cap}}}"]),
        "flowrl, no w": Method([f"objective={{{flowrl}, weight: none}}"]),
        "flowrl, z group": Method([f"objective={{{flowrl}, z: group}}"]),
        "flowrl, z group, no floor": Method([f"objective={{{cap}, z: group}}"]),
        "flowrl, log Z 5 times as fast": Method([*whole.overrides, "optimizer.log_z_lr=0.01"]),
        "flowrl, log Z 5 times as slow": Method([*whole.overrides, "optimizer.log_z_lr=0.0004"]),
        "flowrl, log Z without gradient into the trunk": Method([f"objective={{{flowrl}, z: mlp-detached}}"]),
        "grpo, no std, matched KL (k2)": matched_grpo(PARTS["updates"].kl),
    }


@dataclass(frozen=True)
class Part:
    """One table: the methods, how many steps old the answers are, and how each character of an answer is written."""

    title: str
    ahead: tuple[int, ...]
    repeat: int = 1  # times that an answer's every character is written: the same answers, longer
    updates: int = 1  # a step
    chosen: tuple[str, ...] = ()  # methods; none named: all
    rate: float | None = None  # of all methods; None: each has the one that suits it best
    own: Callable[[], dict[str, Method]] | None = None  # methods of this part alone

    @property
    def kl(self) -> float:
        return round(1 / (BETA * self.length), 4)

    @property
    def length(self) -> float:
        """Tokens of a right answer, its end token included."""
        return (mean_length(dict(TOTALS)) - 1) * self.repeat + 1

    @property
    def all_methods(self) -> Mapping[str, Method]:
        found = self.own() if self.own else all_methods(self.kl)
        return {name: m for name, m in found.items() if not self.chosen or name in self.chosen}

    def methods(self, ahead: int) -> Mapping[str, Method]:
        """Those that differ from each other where answers are so old."""
        found = self.all_methods
        is_fresh = ahead == 0 and self.updates == 1
        return {name: m for name, m in found.items() if not (is_fresh and m.fresh in found)}

    def run_of(self, name: str, ahead: int) -> str:
        """Whose run shows what this method does where answers are so old."""
        return name if name in self.methods(ahead) else str(self.all_methods[name].fresh)

    def overrides(self, ahead: int) -> list[str]:
        """What all runs of this table share."""
        shared = [f"rollout.ahead={ahead}"]
        if self.repeat > 1:
            longest = 6 * self.repeat + 1  # "12+34" and its end, and a character more
            shared += [f"data.task_args={{lo: 10, hi: 99, repeat: {self.repeat}}}", f"rollout.max_tokens={longest}"]
        if self.updates > 1:
            shared += [f"batch.mini_batch={256 // self.updates}"]
        return shared


# Of the part "age" at 16: the three best pass rates, and the best with the matched KL.
BEST = ("gflowrl", "cispo", "gspo", "rloo, matched KL, decoupled")
PARTS = {
    "age": Part("Answers of six tokens, one update a step", (0, 8, 16, 64)),
    "length-24": Part("Answers of 24 tokens", (16,), repeat=5, chosen=BEST),
    "length-96": Part("Answers of 96 tokens", (16,), repeat=21, chosen=BEST),
    "updates": Part("Four updates a step, all at the rate 1e-3", (0,), updates=4, rate=1e-3, own=left_out),
}
