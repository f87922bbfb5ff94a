"""Evaluation of a policy behind an engine: sampled answers, and exact figures where right answers can be listed."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from flowrl_mega.config import EvaluationSettings
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.evaluation.exact import exact_metrics, right_answer_probabilities
from flowrl_mega.evaluation.sampled import sampled_metrics
from flowrl_mega.grading import Grader
from flowrl_mega.model.generation import Sampling
from flowrl_mega.model.policy import Policy
from flowrl_mega.rollout import Engine, Rollout, generate
from flowrl_mega.rollout.group_queue import derive_seed


@dataclass(frozen=True)
class Evaluator:
    """Evaluates whatever weights the engine has. All methods are collective.

    Answers are always drawn from the same seed, so that evaluations compare.
    """

    engine: Engine
    grader: Grader
    sampling: Sampling
    settings: EvaluationSettings
    seed: int

    def evaluate(self, prompts: Prompts, policy: Policy | None = None) -> dict[str, float]:
        """Figures of `settings.samples` answers to each prompt; with the policy itself exact figures, too, where every
        prompt lists its right answers."""
        k = self.settings.samples
        rows = [prompt.row for prompt in prompts for _ in range(k)]
        texts, scores = self.grader.grade(rows, self.rollouts(prompts, k))
        metrics = sampled_metrics(texts, [s.reward for s in scores], [s.right for s in scores], k)
        if policy is not None and all("right_answers" in prompt.row for prompt in prompts):
            metrics |= exact_metrics(self.right_answers(prompts, policy), self.settings.distinct_at)
        return metrics

    def rollouts(self, prompts: Prompts, answers: int) -> list[Rollout]:
        """`answers` answers to each prompt, prompt by prompt."""
        ids, seed = [prompt.token_ids for prompt in prompts], derive_seed(self.seed, 0)
        return [rollout for group in generate(self.engine, ids, answers, self.sampling, seed) for rollout in group]

    def right_answers(self, prompts: Prompts, policy: Policy) -> list[Tensor]:
        """pi(y|x) of every right answer that the prompts' rows list: for each prompt [number of answers] float64."""
        end = self.sampling.stop_ids[:1]
        answers = [[[*self.grader.token_ids(text), *end] for text in prompt.row["right_answers"]] for prompt in prompts]
        ids = [prompt.token_ids for prompt in prompts]
        return right_answer_probabilities(policy, ids, answers, self.sampling.temperature)
