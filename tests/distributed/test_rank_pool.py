"""The test harness itself: a failing or hanging rank must end the test at once, with its own error."""

from __future__ import annotations

import os
import time

import pytest
import rank_pool
from rank_pool import RankFailed, RankPool


def rank_one_fails() -> None:
    if os.environ["RANK"] == "1":
        raise ValueError("the reason of rank 1")
    time.sleep(300)  # as a rank does that waits for the other in a collective


@pytest.mark.ranks
def test_a_rank_that_fails_or_hangs_ends_all():
    """In gloo the other ranks would wait for ever, and the test would show a time-out instead of the reason."""
    pool = RankPool(2)
    try:
        first = pool.run(os.getpid)
        assert len(set(first)) == 2
        start = time.monotonic()
        with pytest.raises(RankFailed, match="(?s)rank 1 failed.*ValueError: the reason of rank 1"):
            pool.run(rank_one_fails)
        assert time.monotonic() - start < 60
        assert not any(_runs(pid) for pid in first)

        second = pool.run(os.getpid)  # a pool starts again by itself
        assert not set(first) & set(second)
        with pytest.raises(RankFailed, match=r"ranks \[0, 1\] did not answer within 1 s"):
            pool.run(time.sleep, 300, timeout=1)
        assert not any(_runs(pid) for pid in second)
    finally:
        pool.close()


@pytest.mark.ranks
def test_an_interrupted_call_leaves_no_answers_for_the_next(monkeypatch):
    """pytest's own time-out raises in the middle of a call; the test after it got that call's answers."""

    def interrupted(*args: object, **kwargs: object) -> None:
        raise TimeoutError

    pool = RankPool(1)
    try:
        (first,) = pool.run(os.getpid)
        monkeypatch.setattr(rank_pool, "wait", interrupted)
        with pytest.raises(TimeoutError):
            pool.run(time.sleep, 300)
        monkeypatch.undo()
        assert not _runs(first)
        (second,) = pool.run(os.getpid)
        assert second not in (None, first)
    finally:
        pool.close()


def _runs(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
