"""What a frozen log Z is estimated from: every prompt's answers once, each under its own prompt."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from flowrl_mega.config import Config
from flowrl_mega.data.loader import Subset
from flowrl_mega.data.prompts import Prompt
from flowrl_mega.model.generation import Sampling
from flowrl_mega.objectives import GRPO, FlowRL
from flowrl_mega.preflight import describe_log_z
from flowrl_mega.reference_answers import ReferenceAnswers
from flowrl_mega.rollout import Request, Rollout

PROMPTS = [Prompt(index, [10 + index], {"reward": index / 10}) for index in range(9)]
FROZEN = FlowRL(beta=2.0, z="frozen", z_answers=8, reward_norm="none")
TRAINING = Subset(PROMPTS, [7, 0, 3, 8, 5])


class Engine:
    """Answers its own number of tokens to each prompt, one more from answer to answer."""

    def __init__(self) -> None:
        self.jobs: list[tuple[int, int]] = []  # requests and seed

    def start(self, requests: list[Request], sampling: Sampling, seed: int, on_answer: Any = None) -> list[Request]:
        self.jobs.append((len(requests), seed))
        assert all(request.max_tokens == sampling.max_tokens for request in requests)
        return requests

    def finish(self, requests: list[Request]) -> list[list[Rollout]]:
        return [[Rollout([1] * (r.prompt[0] + i), [], "stop", []) for i in range(r.answers)] for r in requests]


def grade(rows: list[dict[str, Any]], rollouts: list[Rollout]) -> Any:
    return [], [SimpleNamespace(reward=row["reward"] + len(r.response)) for row, r in zip(rows, rollouts, strict=True)]


@pytest.mark.parametrize(("at_once", "jobs"), [(2, [1] * 5), (7, [2, 2, 1]), (64, [5])])
def test_every_prompt_is_asked_once(at_once: int, jobs: list[int]) -> None:
    """In rounds as large as a step's, each of a seed of its own; indices are those in the data set."""
    engine, grader, sampling = Engine(), SimpleNamespace(grade=grade), Sampling(64, 1.0, 1.0, 0, ())
    found = ReferenceAnswers.ask(engine, grader, TRAINING, 3, sampling, seed=0, at_once=at_once)
    assert [n for n, _ in engine.jobs] == jobs and len({seed for _, seed in engine.jobs}) == len(jobs)
    assert found.indices.tolist() == [7, 0, 3, 8, 5]
    assert found.lengths.tolist() == [[10 + i, 11 + i, 12 + i] for i in (7, 0, 3, 8, 5)]
    torch.testing.assert_close(found.rewards, found.lengths + found.indices[:, None].double() / 10)


def test_log_z_is_known_by_the_prompt() -> None:
    rewards = torch.tensor([[0.0, 1.0], [1.0, 1.0]], dtype=torch.float64)
    answers = ReferenceAnswers(torch.tensor([4, 2]), rewards, torch.tensor([[3, 1], [2, 5]]))
    log_z = answers.log_z(FROZEN)
    assert log_z == {4: FROZEN.frozen_log_z(rewards, answers.lengths)[0].item(), 2: 2.0}
    assert ReferenceAnswers(**answers.state_dict()).log_z(FROZEN) == log_z
    said = answers.describe(log_z)
    assert "2 prompts, estimated from 2 answers" in said and "to 2, mean" in said and "of 1 prompts all answers" in said


@pytest.mark.parametrize(
    ("objective", "checkpoint", "words"),
    [
        (FROZEN, None, "from 8 answers of the reference to each of 100 prompts: as many as 6.25 steps generate"),
        (FROZEN, Path("step_3"), "frozen, as estimated before the first step"),
        (FlowRL(), None, "mlp, lr 0.01"),
        (FlowRL(z="group"), None, "group"),
        (GRPO(), None, "none"),
    ],
)
def test_what_a_plan_says_of_log_z(objective: Any, checkpoint: Path | None, words: str) -> None:
    tree = {"run_dir": "x", "steps": 1, "model": {"path": "x"}, "data": {"path": "x"}, "reward": "x:y"}
    tree |= {"rollout": {"prompts_per_step": 16, "group_size": 8}, "optimizer": {"log_z_lr": 0.01}}
    assert words in describe_log_z(objective, Config.model_validate(tree), 100, checkpoint)
