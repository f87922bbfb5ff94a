"""What single ranks are made to do in their first step: raise, hang or die in place of a collective."""

from __future__ import annotations

import os
import signal
import time
from typing import Any

import torch.distributed as dist

from flowrl_mega.config import ConfigError, RunError

MESSAGE = "prompts.jsonl, line 7: damaged"


def fail() -> None:
    """As FAILURES says: "1:config 2:hang" makes rank 1 raise a ConfigError, and rank 2 hang."""
    for rank, kind in (item.split(":") for item in os.environ["FAILURES"].split()):
        if rank == os.environ.get("RANK", os.environ.get("SLURM_PROCID")):
            dist.all_gather_object = globals()[f"_{kind}"]  # what follows the scoring of answers


def _config(*args: Any, **kwargs: Any) -> None:
    raise ConfigError(MESSAGE)


def _run(*args: Any, **kwargs: Any) -> None:
    raise RunError(MESSAGE)


def _crash(*args: Any, **kwargs: Any) -> None:
    raise ValueError("boom\nand more")


def _hang(*args: Any, **kwargs: Any) -> None:
    time.sleep(600)


def _die(*args: Any, **kwargs: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)
