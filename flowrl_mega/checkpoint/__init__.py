"""Save, find, verify and resume: Megatron distributed checkpoints that load at any tensor-parallel size."""

import flowrl_mega.parallel  # noqa: F401  ("cuda" must mean "cpu" before megatron is imported)
from flowrl_mega.checkpoint.folder import find_checkpoint, verify_checkpoint
from flowrl_mega.checkpoint.state import load_checkpoint, save_checkpoint

__all__ = ["find_checkpoint", "load_checkpoint", "save_checkpoint", "verify_checkpoint"]
