"""The process that a pool's worker is: scores what comes through a socket until its other end is closed."""

from __future__ import annotations

import signal
from multiprocessing.connection import Connection

from flowrl_mega.hangup import outlive_the_terminal, stop_signals
from flowrl_mega.rewards.load import call, load_reward


def main(descriptor: int) -> None:
    """Signals for the job (Ctrl-C, a scheduler's SIGTERM, a closed terminal's SIGHUP) are the trainer's to answer; it
    needs this step's scores."""
    if signal.SIGHUP in stop_signals():
        signal.signal(signal.SIGHUP, lambda *_: outlive_the_terminal())  # a reward may print
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    with Connection(descriptor) as trainer:
        reward = load_reward(trainer.recv())
        trainer.send("ready")
        while True:
            try:
                row, response = trainer.recv()
            except (EOFError, OSError):  # the trainer has closed the pool, or is dead
                return
            trainer.send(call(reward, row, response))
