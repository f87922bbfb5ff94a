"""Grades answers, and keeps them with their grades in RUN_DIR/samples.jsonl, to be read and to be scored."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from flowrl_mega.benchmark.answers import Answer, Place
from flowrl_mega.benchmark.problems import Problems
from flowrl_mega.config import ConfigError
from flowrl_mega.data.modules import modules_of_tests
from flowrl_mega.data.prompts import Row
from flowrl_mega.rewards import minerva
from flowrl_mega.rewards.final_answer import final_answer
from flowrl_mega.rewards.load import Reward, Score
from flowrl_mega.rewards.scorer import Scorer
from flowrl_mega.whole_file import write_whole

SAMPLES = "samples.jsonl"
WITHOUT_ANSWER = ("no answer", "no code")


class Sample(NamedTuple):
    """An answer with its grade. `vote`: its final answer in a normal form, that of all right ones the same; None: it
    has none, or answers of this kind are programs, which do not vote."""

    benchmark: str
    problem: int
    attempt: int
    text: str
    tokens: int | None
    finish: str
    vote: str | None
    score: float
    right: bool
    kind: str  # of the grader: right, wrong, no answer, time-out, ..
    why: str

    @property
    def is_cut_off(self) -> bool:
        return self.finish == "length"

    @property
    def has_no_answer(self) -> bool:
        return self.kind in WITHOUT_ANSWER


def describe_grader(reward: Reward, every: Iterable[Problems]) -> str:
    """What a reward says of itself and these problems, such as the isolation that programs get; it may refuse them."""
    rows = [row for problems in every for row in problems.rows]
    kinds = {str(row.get("kind", "")) for row in rows}
    return reward.describe(kinds, {name for row in rows for name in modules_of_tests(row)})


def grade(problems: Problems, answers: dict[Place, Answer], scorer: Scorer) -> list[Sample]:
    """The samples of one benchmark, by problem and attempt. Collective."""
    places = sorted(place for place in answers if place.benchmark == problems.name)
    rows, texts = [problems.rows[place.problem] for place in places], [answers[place].text for place in places]
    scores = scorer.score(rows, texts, places)
    return [_sample(place, answers[place], row, score) for place, row, score in zip(places, rows, scores, strict=True)]


def _sample(place: Place, answer: Answer, row: Row, score: Score) -> Sample:
    said = vote(row, answer.text, score.right)
    return Sample(
        *place, answer.text, answer.tokens, answer.finish, said, score.reward, score.right, score.kind, score.reason
    )


def vote(row: Row, text: str, right: bool) -> str | None:
    """What an answer says in a vote: the right answer as the row has it, or the normal form of what it gives."""
    if "tests" in row:
        return None
    if right:
        return str(row.get("answer", "right"))
    if row.get("kind") == "math_dapo":
        found = minerva.extract(text)
        return minerva.normalise(found[0]) if found else None
    given = final_answer(text)
    return minerva.normalise(given) if given is not None else None


def write_samples(run_dir: Path, samples: Sequence[Sample]) -> None:
    write_whole(run_dir / SAMPLES, (json.dumps(sample._asdict(), ensure_ascii=False) + "\n" for sample in samples))


def read_samples(run_dir: Path) -> Iterator[Sample]:
    """Those of the last grading. ConfigError where there are none, or for a line that is none."""
    file = run_dir / SAMPLES
    if not file.is_file():
        raise ConfigError(f"{run_dir}: holds no {SAMPLES}; give the folder of an evaluation that has ended")
    with file.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            try:
                row: dict[str, Any] = json.loads(line)
                yield Sample(**row)
            except (ValueError, TypeError):
                raise ConfigError(f"{file}, line {number}: is no sample; grade again with --regrade") from None
