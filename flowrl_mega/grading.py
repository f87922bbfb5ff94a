"""Decodes and scores answers, and picks the samples that people read."""

from __future__ import annotations

from typing import Any

from flowrl_mega.config import Config
from flowrl_mega.data.loader import whole
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.monitor.distributions import Watched
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.rewards.final_answer import final_answer
from flowrl_mega.rewards.load import Reward, Score
from flowrl_mega.rewards.scorer import Scorer, with_overlong_penalty
from flowrl_mega.rollout import Rollout
from flowrl_mega.rollout.group_queue import Group


class Grader:
    """Decodes and scores answers to `prompts`.

    `grade` and `grade_groups` are collective; `begin` may be called from any thread. `is_early`: whether `begin` does
    anything, that is whether rewards have processes of their own.
    """

    def __init__(self, config: Config, layout: Layout, reward: Reward, prompts: Prompts, tokenizer: Any) -> None:
        self.config, self.prompts, self.tokenizer = config, prompts, tokenizer
        self.scorer = Scorer(reward, config.reward, layout)
        self.is_early = self.scorer.pool is not None

    def begin(self, group: Group, i: int, rollout: Rollout) -> None:
        """Let a worker score the group's answer `i` while others are still being written."""
        self.scorer.begin((group.position, i), self.row(group), self.text(rollout))

    def grade_groups(self, groups: list[Group]) -> None:
        """Fill in texts and scores of complete groups; the same on all ranks."""
        rows = [row for group in groups for row in [self.row(group)] * len(group.rollouts)]
        keys = [(group.position, i) for group in groups for i in range(len(group.rollouts))]
        texts, scores = self.grade(rows, [rollout for group in groups for rollout in group.rollouts], keys)
        for group in groups:
            n = len(group.rollouts)
            group.texts, texts = texts[:n], texts[n:]
            group.scores, scores = scores[:n], scores[n:]

    def grade(
        self, rows: list[dict[str, Any]], rollouts: list[Rollout], keys: list[Any] | None = None
    ) -> tuple[list[str], list[Score]]:
        """Texts and scores of answers, each to its row's prompt; `keys` are those that some were begun under."""
        texts, lengths = [self.text(rollout) for rollout in rollouts], [len(r.response) for r in rollouts]
        scores = self.scorer.score(rows, texts, keys)
        overlong = self.config.reward.overlong
        return texts, with_overlong_penalty(scores, lengths, self.config.rollout.max_tokens, overlong)

    def samples(self, groups: list[Group]) -> list[dict[str, Any]]:
        """The first few answers of graded groups, to be read by people."""
        rows = [
            {"prompt": self.row(group)["prompt"], "response": text, **vars(score)}
            for group in groups
            for text, score in zip(group.texts, group.scores, strict=True)
        ]
        return rows[: self.config.monitor.samples_per_step]

    def watched(self, groups: list[Group]) -> list[Watched]:
        """Graded groups as the monitors read them: answers are the same where their final answers are, or where they
        have none, their texts."""
        found = []
        for group in groups:
            row = self.row(group)
            said = [answer if (answer := final_answer(text)) is not None else text.strip() for text in group.texts]
            rewards, right = zip(*((score.reward, score.right) for score in group.scores), strict=True)
            lengths = [len(rollout.response) for rollout in group.rollouts]
            prompt, kind, exact = str(row["prompt"]), row.get("kind"), row.get("log_z")
            found.append(Watched(prompt, said, list(rewards), list(right), lengths, kind, exact))
        return found

    def row(self, group: Group) -> dict[str, Any]:
        """What the data set says of the group's prompt."""
        return whole(self.prompts)[group.index].row

    def text(self, rollout: Rollout) -> str:
        return self.tokenizer.decode(rollout.response, skip_special_tokens=True)

    def token_ids(self, text: str) -> list[int]:
        """The tokens of an answer's text, without an end token."""
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def close(self) -> None:
        self.scorer.close()
