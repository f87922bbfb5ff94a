"""What ranks are made to do before they train: die by SIGKILL at one exact place, as a kill -9 there would; be told to
stop; or have a clock of their own."""

from __future__ import annotations

import os
import signal
from itertools import count
from types import SimpleNamespace
from typing import Any

from flowrl_mega import run, train
from flowrl_mega.benchmark import answers
from flowrl_mega.checkpoint import folder, state


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def before_the_first_checkpoint() -> None:
    _in_second_update_of(1)


def between_updates() -> None:
    """Step 5 has updated the weights once, and its rollouts and the random states have moved on."""
    _in_second_update_of(5)


def while_saving() -> None:
    """The files of step 4 lie under the temporary name; rank 0 dies before they are renamed."""
    _at_second_call_of_rank_0(folder, "_flush")


def while_removing() -> None:
    """Step 4 has its name; the older checkpoints are still there."""
    _at_second_call_of_rank_0(state, "remove_old")


def at_the_70th_answer() -> None:
    """Of an evaluation, on every rank; with 128 answers of the first batch on two ranks that is one of the second."""
    _nth_call(answers.AnswerFile, "add", 70)


def hung_up() -> None:
    """Rank 1 alone is told in step 3 that its terminal was closed."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # also where the tests themselves run under nohup
    update = train.Trainer.update

    def told(self: train.Trainer, mini_batch: Any) -> dict[str, float]:
        if self.step_done == 2 and os.environ["RANK"] == "1":
            os.kill(os.getpid(), signal.SIGHUP)
        return update(self, mini_batch)

    train.Trainer.update = told  # type: ignore[method-assign]


def late_on_rank_1() -> None:
    """Its clock goes on by years a step."""
    if os.environ["RANK"] == "1":
        run.time = SimpleNamespace(monotonic=count(step=1e9).__next__)  # type: ignore[assignment]


def _nth_call(place: Any, name: str, n: int) -> None:
    """Die in the n-th call of a method, before it does anything."""
    plain, calls = getattr(place, name), count(1)
    setattr(place, name, lambda *args: _die() if next(calls) == n else plain(*args))


def _in_second_update_of(step: int) -> None:
    update, done = train.Trainer.update, []

    def counted(self: train.Trainer, mini_batch: Any) -> dict[str, float]:
        done.append(self.step_done + 1)
        if done.count(step) == 2:
            _die()
        return update(self, mini_batch)

    train.Trainer.update = counted  # type: ignore[method-assign]


def _at_second_call_of_rank_0(module: Any, name: str) -> None:
    real, calls = getattr(module, name), []

    def counted(*args: Any) -> None:
        calls.append(args)
        if len(calls) == 2:
            _die()
        real(*args)

    setattr(module, name, counted)
