"""What a frozen log Z is estimated from: the reference's own answers to every prompt (`objective.z: frozen`).

They are asked for once, before the first step, when the engine still holds the reference: the weights that the run
starts from. Later no engine does, so a prompt that comes later would have no estimate. Drawn from the reference, each
answer has the importance weight 1; what is kept of it is all that log Z depends on, its reward and its length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowrl_mega.data.prompts import Prompts
from flowrl_mega.grading import Grader
from flowrl_mega.model.generation import Sampling
from flowrl_mega.objectives import Objective
from flowrl_mega.rollout import Engine, generate
from flowrl_mega.rollout.group_queue import derive_seed

ASKED = 1 << 21  # sets these rounds apart from those of the steps, and from the choice of replayed groups


@dataclass(frozen=True)
class ReferenceAnswers:
    """Of N answers to each of P prompts: indices [P] into the data set, rewards [P, N] float64, lengths [P, N]."""

    indices: Tensor
    rewards: Tensor
    lengths: Tensor

    @classmethod
    def ask(
        cls, engine: Engine, grader: Grader, prompts: Prompts, answers: int, sampling: Sampling, seed: int, at_once: int
    ) -> ReferenceAnswers:
        """Of an engine that holds the reference; about `at_once` answers at a time. Collective."""
        rewards: list[float] = []
        lengths: list[int] = []
        step = max(1, at_once // answers)
        for start in range(0, len(prompts), step):
            asked = prompts[start : start + step]
            ids, drawn_by = [prompt.token_ids for prompt in asked], derive_seed(seed, start, ASKED)
            rollouts = [r for group in generate(engine, ids, answers, sampling, drawn_by) for r in group]
            _, scores = grader.grade([prompt.row for prompt in asked for _ in range(answers)], rollouts)
            rewards += [score.reward for score in scores]
            lengths += [len(rollout.response) for rollout in rollouts]
        shape = (len(prompts), answers)
        indices = torch.tensor([prompt.index for prompt in prompts])
        return cls(indices, torch.tensor(rewards, dtype=torch.float64).view(shape), torch.tensor(lengths).view(shape))

    def state_dict(self) -> dict[str, Tensor]:
        return vars(self)

    def log_z(self, objective: Objective) -> dict[int, float]:
        """Each prompt's, by its index in the data set."""
        estimated = objective.frozen_log_z(self.rewards, self.lengths)
        return dict(zip(self.indices.tolist(), estimated.tolist(), strict=True))

    def describe(self, log_z: dict[int, float]) -> str:
        """What the estimate is worth, in words."""
        values = torch.tensor([*log_z.values()], dtype=torch.float64)
        alike = int((self.rewards == self.rewards[:, :1]).all(1).sum())
        return (
            f"log Z of {len(values)} prompts, estimated from {self.rewards.shape[1]} answers of the reference to each: "
            f"{values.min():.4g} to {values.max():.4g}, mean {values.mean():.4g}; of {alike} prompts all answers have "
            "the same reward, and log Z knows of no other"
        )
