"""Rewards of a step over real ranks: begun while answers come, dealt out, the same on every rank and in every way."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import jobs
import pytest

from flowrl_mega.config import ParallelSettings, RewardSettings
from flowrl_mega.parallel import layout as layouts
from flowrl_mega.rewards.load import Score, load_reward
from flowrl_mega.rewards.scorer import Scorer

pytestmark = pytest.mark.ranks

SLEEPER = """
import os, time

def score(row, response):
    time.sleep(row["seconds"])
    return float(len(response)), str(os.getpid()), "slept"
"""


def scored(spec: str, rows: list[dict[str, Any]], texts: list[str], first_begins: bool) -> tuple[list[Score], float]:
    """In a rank: all scores, and the seconds that `score` took."""
    layout, settings = layouts.init(ParallelSettings(dp=2), 0), RewardSettings(function=spec, workers=2)
    scorer = Scorer(load_reward(settings), settings, layout)
    try:
        scorer.score(rows[:4], texts[:4])  # the workers are up
        if first_begins and layout.rank == 0:
            for place, (row, text) in enumerate(zip(rows, texts, strict=True)):
                scorer.begin(place, row, text)
            time.sleep(1.5)  # the answers that are still being written
        layout.gather_objects(None)
        start = time.perf_counter()
        return scorer.score(rows, texts, range(len(rows))), time.perf_counter() - start
    finally:
        scorer.close()


@pytest.mark.parametrize("first_begins", [True, False])
def test_every_rank_gets_every_score_in_order(first_begins: bool, ranks2, tmp_path: Path) -> None:
    """Servers answer to rank 0 alone: what it has not begun by the end is dealt out to the others' workers, too."""
    (tmp_path / "sleeper.py").write_text(SLEEPER)
    texts = ["x" * n for n in range(1, 25)]
    rows = [{"seconds": 0.2} for _ in texts]
    (first, seconds), (second, _) = ranks2.run(scored, f"{tmp_path}/sleeper.py:score", rows, texts, first_begins)
    assert first == second
    assert [score.reward for score in first] == [float(len(text)) for text in texts]
    assert len({score.reason for score in first}) == 4  # both workers of both ranks
    one_after_the_other = sum(row["seconds"] for row in rows)
    assert seconds < one_after_the_other / 2


def test_processes_and_early_scores_do_not_change_a_run(tiny_llama: Path, tmp_path: Path) -> None:
    """With workers, and answers scored as they end, two ranks write the very records of a run that scores in the
    ranks; each answer's reason and kind are in samples.jsonl, the kinds counted in the metrics."""
    (tmp_path / "graded.py").write_text(
        "from flowrl_mega.rewards import sums\n\n"
        "def score(row, response):\n"
        "    reward, why = sums.score(row, response)\n"
        "    return reward + len(response) % 3, f'{why}: {len(response)}', 'right' if reward else 'wrong'\n"
    )
    found = []
    for workers in (0, 2):
        folder = tmp_path / str(workers)
        folder.mkdir()
        config = jobs.write_config(
            folder, tiny_llama, steps=2, reward={"function": f"{tmp_path}/graded.py:score", "workers": workers}
        )
        jobs.Job(["train", str(config)], folder / "log").run()
        metrics = jobs.records(folder / "run", "metrics")
        found.append((metrics, jobs.records(folder / "run", "samples")))
    assert found[0] == found[1]
    metrics, samples = found[0]
    assert all(line.get("verdict/right", 0) + line["verdict/wrong"] == 16 for line in metrics)
    assert {"reward", "reason", "failed", "kind", "response", "prompt"} <= samples[0].keys()
    assert samples[0]["reason"] == f"not 2 numbers joined by '+': {len(samples[0]['response'])}"
