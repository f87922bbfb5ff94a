"""Rewards of a step's answers: begun as the answers come, while others are generated, and shared over all ranks."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable, Sequence
from concurrent.futures import Future, wait
from dataclasses import replace
from threading import Lock
from typing import Any

from flowrl_mega.config import OverlongSettings, RewardSettings
from flowrl_mega.parallel.layout import Layout, ranks_on_host
from flowrl_mega.rewards.load import Reward, Score, call, refuse_all_failed
from flowrl_mega.rewards.overlong import overlong_penalty
from flowrl_mega.rewards.pool import Pool

Row = dict[str, Any]
HEARD_S = 5.0  # ranks whose rewards are done hear from the others at least so often


class Scorer:
    """Scores with `reward`, the function of `settings`, which worker processes load themselves.

    `begin` may be called on any rank and from any thread; `score` is collective.
    """

    def __init__(self, reward: Reward, settings: RewardSettings, layout: Layout) -> None:
        self.reward, self.settings, self.layout = reward, settings, layout
        workers = settings.workers
        if workers is None:
            workers = 0 if self.reward.is_quick else max(1, (os.cpu_count() or 1) // ranks_on_host())
        self.pool = Pool(settings, workers) if workers else None
        self.begun: dict[Hashable, Future[Score]] = {}
        self.lock = Lock()

    def begin(self, key: Hashable, row: Row, text: str) -> None:
        """Start on an answer that `score` will ask for under the same key; nothing where there are no workers."""
        if self.pool:
            future = self.pool.submit(row, text)
            with self.lock:
                self.begun[key] = future

    def score(self, rows: Sequence[Row], texts: Sequence[str], keys: Sequence[Hashable] | None = None) -> list[Score]:
        """The scores of all answers, on every rank; `keys` are those that some were begun under.

        What a rank is working on it ends; what waits in its queue or was never begun is dealt out to all. Collective.
        """
        with self.lock:
            begun = {i: self.begun.pop(key) for i, key in enumerate(keys or []) if key in self.begun}
        if self.layout.world > 1:
            begun = {i: future for i, future in begun.items() if not future.cancel()}
        taken = {i for places in self.layout.gather_objects(sorted(begun)) for i in places}
        left = [i for i in range(len(rows)) if i not in taken]
        mine = left[self.layout.rank :: self.layout.world]
        found: dict[int, Score] = {}
        for part in self.layout.gather_objects(self._own(begun, mine, rows, texts)):
            found.update(part)
        scores = [found[i] for i in range(len(rows))]
        refuse_all_failed(scores)
        return scores

    def close(self) -> None:
        if self.pool:
            self.pool.close()

    def _own(
        self, begun: dict[int, Future[Score]], places: list[int], rows: Sequence[Row], texts: Sequence[str]
    ) -> dict[int, Score]:
        """This rank's scores by place, when every rank has its own. Collective."""
        if self.pool is None:
            return {i: call(self.reward, rows[i], texts[i]) for i in places}
        futures = begun | {i: self.pool.submit(rows[i], texts[i]) for i in places}
        while True:  # no collective waits longer than HEARD_S, however long one rank's programs take
            waiting = wait(futures.values(), HEARD_S).not_done
            if not any(self.layout.gather_objects(bool(waiting))):
                return {i: future.result() for i, future in futures.items()}


def verdicts(scores: Sequence[Score]) -> dict[str, float]:
    """How many scores there are of each kind, as metrics."""
    return {f"verdict/{kind}": float(count) for kind, count in sorted(Counter(s.kind for s in scores).items()) if kind}


def with_overlong_penalty(
    scores: Sequence[Score], lengths: Sequence[int], max_tokens: int, settings: OverlongSettings | None
) -> list[Score]:
    """Scores less what `reward.overlong` takes off for answers of these lengths, in tokens."""
    if settings is None:
        return list(scores)
    penalised = []
    for score, length in zip(scores, lengths, strict=True):
        penalty = overlong_penalty(length, max_tokens, settings.buffer, settings.penalty)
        reason = f"{score.reason}; overlong {penalty:+.3g}" if penalty else score.reason
        penalised.append(replace(score, reward=score.reward + penalty, reason=reason))
    return penalised
