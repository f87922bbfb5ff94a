"""Benchmarks while a run trains: problems, grades and scores of `flowrl-mega eval`, answers by the run's own engine."""

from __future__ import annotations

from typing import Any, NamedTuple

from flowrl_mega.benchmark.answers import Answer, Place
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.benchmark.samples import describe_grader, grade
from flowrl_mega.benchmark.scores import scores
from flowrl_mega.benchmark.writer import answer_of, seed_of
from flowrl_mega.config import Config, RewardSettings
from flowrl_mega.data.prompts import Prompt, tokenized
from flowrl_mega.model.generation import Sampling
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rewards.load import load_reward
from flowrl_mega.rewards.scorer import Scorer
from flowrl_mega.rollout import Engine, generate


class Asked(NamedTuple):
    problems: Problems
    prompts: list[Prompt]


def asked_by(config: Config, tokenizer: Any) -> list[Asked]:
    """The problems of evaluation.benchmarks, as the run's own prompts are made. ConfigError as of `table.load`."""
    settings, data = config.evaluation.benchmarks, config.data
    if not settings.names:
        return []
    from flowrl_mega.benchmark.table import load  # which brings the recipes of data sets along

    every = load(settings.names, settings.data, settings.problems, config.seed, "evaluation.benchmarks")
    return [
        Asked(of, tokenized(of.rows, tokenizer, data.chat_template, data.max_prompt_tokens, data.template_date))
        for of in every
    ]


def grader_settings(config: Config) -> RewardSettings:
    """As those of training, but each benchmark is graded by its own kind, and length costs nothing."""
    own = {"function": "flowrl_mega.rewards.by_kind:score", "overlong": None, "right_at": None}
    return config.reward.model_copy(update=own)


def describe_graders(config: Config, asked: list[Asked]) -> str:
    """What the benchmarks' grader says of itself; it may refuse. "" without benchmarks."""
    every = [of.problems for of in asked]
    return describe_grader(load_reward(grader_settings(config)), every) if every else ""


class TrainingBenchmarks:
    """All methods are collective."""

    def __init__(
        self, config: Config, layout: Layout, engine: Engine, asked: list[Asked], tokenizer: Any, ends: tuple[int, ...]
    ) -> None:
        self.config, self.layout, self.engine, self.asked, self.tokenizer = config, layout, engine, asked, tokenizer
        settings = config.evaluation.benchmarks
        most = settings.max_tokens or config.rollout.max_tokens
        self.sampling = Sampling(most, settings.temperature, settings.top_p, 0, ends)

    def evaluate(self) -> dict[str, float]:
        """Figures of whatever weights the engine has, by NAME/FIGURE; always drawn from the same seeds."""
        reward = grader_settings(self.config)
        scorer = Scorer(load_reward(reward), reward, self.layout)
        try:
            return {
                f"{of.problems.name}/{figure}": value for of in self.asked for figure, value in self._scores(of, scorer)
            }
        finally:
            scorer.close()

    def _scores(self, of: Asked, scorer: Scorer) -> list[tuple[str, float]]:
        k, name = self.config.evaluation.benchmarks.k, of.problems.name
        seed = seed_of(self.config.seed, name, 0)
        groups = generate(self.engine, [prompt.token_ids for prompt in of.prompts], k, self.sampling, seed)
        answers: dict[Place, Answer] = {
            Place(name, i, attempt): answer_of(rollout, self.tokenizer, self.sampling)
            for i, group in enumerate(groups)
            for attempt, rollout in enumerate(group)
        }
        found = scores(grade(of.problems, answers, scorer), k)
        shares = {figure: found[figure] for figure in (f"avg@{k}", f"pass@{k}", f"maj@{k}") if figure in found}
        counted = {
            figure: found[figure] / found["answers"] for figure in ("cut_off", "no_answer", "time_out", "failed")
        }
        length = {"mean_tokens": found["mean_tokens"]}
        return [*(shares | counted | length).items()]
