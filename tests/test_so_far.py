"""Long work says how long it has taken; quick work says nothing, and the teller ends with it, whatever happens."""

from __future__ import annotations

import io
import re
import threading
import time

import pytest

from flowrl_mega import so_far as module
from flowrl_mega.so_far import so_far


def test_lines_while_the_work_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "EVERY_S", 0.01)
    stream, done = io.StringIO(), iter(range(10**6))
    with so_far("saving step_4", count=lambda: f"{next(done)} files", stream=stream):
        for _ in range(1000):
            if stream.getvalue().count("\n") >= 3:
                break
            time.sleep(0.01)
    lines = stream.getvalue().splitlines()
    assert len(lines) >= 3
    for number, line in enumerate(lines):
        assert re.fullmatch(rf"flowrl-mega: saving step_4: \d+ s so far, {number} files", line)
    told = len(lines)
    time.sleep(0.1)
    assert len(stream.getvalue().splitlines()) == told, "nothing after the end"


def test_what_is_quick_or_another_ranks_says_nothing() -> None:
    stream, threads = io.StringIO(), threading.active_count()
    with so_far("quick", stream=stream):
        pass
    with so_far("on another rank", show=False, stream=stream):
        assert threading.active_count() == threads
    assert not stream.getvalue() and threading.active_count() == threads


def test_it_ends_where_the_work_fails() -> None:
    threads = threading.active_count()
    with pytest.raises(OSError, match="no space"), so_far("saving", stream=io.StringIO()):
        raise OSError("no space")
    assert threading.active_count() == threads
