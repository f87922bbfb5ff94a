"""Save, find, check and resume; Hugging Face folder <-> Megatron distributed checkpoint, which loads in any layout."""

import flowrl_mega.parallel  # noqa: F401  ("cuda" must mean "cpu" before megatron is imported)
from flowrl_mega.checkpoint.convert import hf_to_megatron, megatron_to_hf
from flowrl_mega.checkpoint.folder import find_checkpoint, is_megatron, remove_unfinished, step_of
from flowrl_mega.checkpoint.policy_tensors import critic_in_checkpoint, read_side_files
from flowrl_mega.checkpoint.state import (
    check_checkpoint,
    check_model,
    load_checkpoint,
    load_model,
    save_checkpoint,
)

__all__ = [
    "check_checkpoint", "check_model", "critic_in_checkpoint", "find_checkpoint", "hf_to_megatron", "is_megatron",
    "load_checkpoint", "load_model", "megatron_to_hf", "read_side_files", "remove_unfinished", "save_checkpoint",
    "step_of",
]  # fmt: skip
