"""Rewards in worker processes: side by side, and whatever one of them does, the trainer goes on."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from flowrl_mega.config import OverlongSettings, RewardSettings
from flowrl_mega.rewards.load import Score
from flowrl_mega.rewards.pool import Pool
from flowrl_mega.rewards.scorer import verdicts, with_overlong_penalty

pytestmark = pytest.mark.slow

SOURCE = """
import os, signal, threading, time

def score(row, response):
    if response == "hang":
        while True:
            pass
    if response == "die":
        os.kill(os.getpid(), signal.SIGKILL)
    if response == "die once" and not os.path.exists(row["mark"]):
        open(row["mark"], "w").close()
        os._exit(3)
    if response == "wait":
        time.sleep(row["seconds"])
    assert threading.current_thread() is threading.main_thread()
    return float(len(response)), str(os.getpid()), "length"

score.wrong = -1.0
"""


@pytest.fixture
def pool(tmp_path: Path, request: pytest.FixtureRequest):
    """Two workers with a reward that does what the answer says, in a minute or the seconds of the test's parameter."""
    (tmp_path / "obeying.py").write_text(SOURCE)
    settings = RewardSettings(function=f"{tmp_path}/obeying.py:score", timeout_s=getattr(request, "param", 60.0))
    pool = Pool(settings, workers=2)
    yield pool
    pool.close()


def test_answers_are_scored_in_other_processes_and_at_once(pool: Pool) -> None:
    """In a main thread, where graders may use alarms; two that wait a second each, while this process goes on."""
    pool.submit({}, "warm").result(), pool.submit({}, "warm").result()
    slow = [pool.submit({"seconds": 0.5}, "wait") for _ in range(2)]
    assert not any(future.done() for future in slow)
    first, second = (future.result() for future in slow)
    assert (first.reward, first.kind, first.failed) == (4.0, "length", False)
    assert len({first.reason, second.reason, str(os.getpid())}) == 3


@pytest.mark.parametrize("pool", [1.0], indirect=True)
def test_a_hanging_or_dying_reward_is_a_wrong_answer_and_is_counted(pool: Pool) -> None:
    """Each costs its own answer alone: the ones behind it get their scores from a new process."""
    texts = ["hang", "die", "good", "hang", "fine"]
    scores = [future.result() for future in [pool.submit({}, text) for text in texts]]
    assert [score.reward for score in scores] == [-1.0, -1.0, 4.0, -1.0, 4.0]
    assert [score.kind for score in scores] == ["time-out", "crash", "length", "time-out", "length"]
    assert [score.failed for score in scores] == [True, True, False, True, False]
    assert scores[0].reason == "no verdict after 1 s (reward.timeout_s)"
    assert scores[1].reason == "the reward's process ended twice (exit code -9)"
    assert verdicts(scores) == {"verdict/crash": 1.0, "verdict/length": 2.0, "verdict/time-out": 2.0}


def test_one_crash_is_forgiven(pool: Pool, tmp_path: Path) -> None:
    """It may have been the memory of a moment; a wrong score would be a lie about the answer."""
    score = pool.submit({"mark": str(tmp_path / "mark")}, "die once").result()
    assert (score.reward, score.failed) == (8.0, False)


def test_signals_meant_for_the_job_do_not_end_a_worker(pool: Pool) -> None:
    """A scheduler's SIGTERM, Ctrl-C and a closed terminal's SIGHUP reach every process of the job; the step under way
    still needs its scores."""
    process = int(pool.submit({}, "who").result().reason)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        os.kill(process, number)
    both = [pool.submit({"seconds": 0.2}, "wait") for _ in range(2)]
    assert str(process) in {future.result().reason for future in both}


def test_nothing_is_left_when_the_trainer_is_killed(tmp_path: Path) -> None:
    """kill -9 of a rank gives it no time to clean up: its workers must see that they are alone."""
    (tmp_path / "obeying.py").write_text(SOURCE)
    code = (
        "from flowrl_mega.config import RewardSettings\nfrom flowrl_mega.rewards.pool import Pool\n"
        f"pool = Pool(RewardSettings(function={str(tmp_path / 'obeying.py:score')!r}), 2)\n"
        "print(*{pool.submit({'seconds': 0.3}, 'wait').result().reason for _ in range(6)}, flush=True)\n"
        "import time; time.sleep(60)\n"
    )
    trainer = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert trainer.stdout
    workers = [psutil.Process(int(number)) for number in trainer.stdout.readline().split()]
    assert workers
    trainer.kill()
    trainer.wait()
    gone, alive = psutil.wait_procs(workers, timeout=60)
    assert not alive


def test_closing_ends_even_a_hanging_worker(tmp_path: Path) -> None:
    """Or a stopped run would stay until the time-out."""
    (tmp_path / "obeying.py").write_text(SOURCE)
    pool = Pool(RewardSettings(function=f"{tmp_path}/obeying.py:score", timeout_s=60), workers=1)
    pool.submit({}, "warm").result()
    (worker,) = pool._workers
    hanging, waiting = pool.submit({}, "hang"), pool.submit({}, "warm")
    time.sleep(0.2)
    pool.close()
    assert hanging.result(timeout=10).kind == "crash"
    assert waiting.cancelled()
    assert worker.process.returncode is not None


def test_the_penalty_of_long_answers_is_taken_off_and_said() -> None:
    """DAPO's: none up to max_tokens - buffer, then falling to -penalty; on top of what the answer earned."""
    scores = [Score(1.0, "right", False, "right")] * 3
    found = with_overlong_penalty(scores, [60, 90, 100], 100, OverlongSettings(buffer=20, penalty=2.0))
    assert [score.reward for score in found] == [1.0, 0.0, -1.0]
    assert [score.reason for score in found] == ["right", "right; overlong -1", "right; overlong -2"]
    assert with_overlong_penalty(scores, [60, 90, 100], 100, None) == scores
