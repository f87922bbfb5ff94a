"""What rewards.py times in a process of its own: one reward over one work, in this checkout or in an earlier one.

The first line of standard input is the job, in JSON; it is answered when all is warm. Every further line asks for one
measurement. Which checkout's rewards they are is up to PYTHONPATH.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

START = "import sys; sys.path.append({folder!r}); from rewards_work import main; main()"
Call = tuple[dict[str, Any], str]  # a row and a response


class Timed:
    """Such a process. `seconds()` is one measurement of all calls, `rewards` what the last one gave."""

    def __init__(self, checkout: Path, spec: str, work: list[Call], warm_up: list[Call]) -> None:
        self.rewards: list[float] = []
        self.process = subprocess.Popen(
            [sys.executable, "-c", START.format(folder=str(Path(__file__).parent))],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": str(checkout)}, cwd=checkout,  # which Python looks through first
        )  # fmt: skip
        self._ask({"checkout": str(checkout), "spec": spec, "work": work, "warm_up": warm_up})

    def seconds(self) -> float:
        seconds, self.rewards = self._ask("once more")
        return seconds

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()

    def _ask(self, question: Any) -> Any:
        assert self.process.stdin and self.process.stdout
        print(json.dumps(question), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())


def main() -> None:
    job = json.loads(sys.stdin.readline())
    reward = reward_of(job["spec"], job["checkout"])
    for call in job["warm_up"]:
        reward(*call)
    print("null", flush=True)
    # Math: what other jobs of the machine do does not count. Programs run in processes of their own.
    clock = time.process_time if "math" in job["spec"] else time.perf_counter
    measure = in_a_fork if job["spec"].endswith("verify") else timed  # only it remembers what it has read
    for _ in sys.stdin:
        print(json.dumps(measure(reward, job["work"], clock)), flush=True)


def reward_of(spec: str, checkout: str) -> Any:
    from flowrl_mega import config

    assert Path(config.__file__).is_relative_to(checkout), f"{config.__file__} is not in {checkout}"
    if hasattr(config, "RewardSettings"):
        from flowrl_mega.rewards.load import load_reward

        return load_reward(config.RewardSettings(function=spec))
    from flowrl_mega.rewards import registry  # until November 2026

    return registry.load_reward(spec)


def timed(reward: Any, work: list[Call], clock: Callable[[], float]) -> tuple[float, list[float]]:
    start = clock()
    rewards = [reward(*call)[0] for call in work]
    return clock() - start, rewards


def in_a_fork(reward: Any, work: list[Call], clock: Callable[[], float]) -> tuple[float, list[float]]:
    """As in a worker that is warm but has not met these answers: what is read is forgotten before the next time."""
    ours, theirs = os.pipe()
    if os.fork() == 0:
        with open(theirs, "w") as pipe:
            json.dump(timed(reward, work, clock), pipe)
        os._exit(0)
    os.close(theirs)
    with open(ours) as pipe:
        answer = json.load(pipe)
    os.wait()
    return answer
