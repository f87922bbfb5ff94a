"""Save, find, check and resume: Megatron distributed checkpoints that load at any tensor-parallel size."""

import flowrl_mega.parallel  # noqa: F401  ("cuda" must mean "cpu" before megatron is imported)
from flowrl_mega.checkpoint.folder import find_checkpoint, remove_unfinished, step_of
from flowrl_mega.checkpoint.state import check_checkpoint, load_checkpoint, save_checkpoint

__all__ = [
    "check_checkpoint", "find_checkpoint", "load_checkpoint", "remove_unfinished", "save_checkpoint", "step_of",
]  # fmt: skip
