"""What two ranks are made to be before they train: each on a host of its own, and what is wrong with the second."""

from __future__ import annotations

import os
import shutil
import socket
import time
from types import SimpleNamespace
from typing import Any

from flowrl_mega import job, network


def both_well() -> None:
    os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "HOST": "first host"}
    if os.environ["RANK"] == "1":
        os.environ["HOST"] = "second host"
    socket.gethostname = lambda: os.environ["HOST"]


def disk_of_the_second_is_full() -> None:
    both_well()
    if os.environ["RANK"] == "1":
        shutil.disk_usage = lambda path: SimpleNamespace(free=1000)  # type: ignore[assignment, return-value]


def interface_of_the_second_is_missing() -> None:
    both_well()
    if os.environ["RANK"] == "1":
        os.environ["NCCL_SOCKET_IFNAME"] = "ib9"


def second_does_not_answer() -> None:
    both_well()
    real = network._sum

    def sum_(layout: Any, *rest: Any) -> float:
        if layout.rank == 1:
            time.sleep(60)
        return real(layout, *rest)

    network._sum, job.LIMIT_S = sum_, 1.0
