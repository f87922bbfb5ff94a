"""Ranks (rank_pool.py) in processes with the emulated Transformer Engine.

They are forked from a server of their own, which has imported it once: that takes ten seconds, most of them for what
Transformer Engine imports of torch's compiler.
"""

from __future__ import annotations

import os
from multiprocessing import context, forkserver, popen_forkserver
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rank_pool import RankPool

TESTS = Path(__file__).resolve().parents[1]
SERVER = forkserver.ForkServer()
SERVER.set_forkserver_preload(["transformer_engine_emulation.started"])


class Popen(popen_forkserver.Popen):
    def _launch(self, process_obj: Any) -> None:
        path = os.pathsep.join([str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with patch.dict(os.environ, PYTHONPATH=path):
            SERVER.ensure_running()
        with patch.object(forkserver, "connect_to_new_process", SERVER.connect_to_new_process):
            super()._launch(process_obj)


class Process(BaseProcess):
    _start_method = "forkserver"

    @staticmethod
    def _Popen(process_obj: Any) -> Popen:
        return Popen(process_obj)


class Context(context.ForkServerContext):
    Process = Process  # type: ignore[assignment]


def emulated_ranks(world: int) -> RankPool:
    return RankPool(world, context=Context())
