"""Which tokens end an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.json_file import read_object

GENERATION = "generation_config.json"


def stop_ids(path: str | Path, tokenizer: Any, needed: bool = True) -> tuple[int, ...]:
    """Ids of the end tokens, sorted: those of generation_config.json, or else of config.json, or else the tokenizer's.

    That is transformers' order. `eos_token_id` is an id or a list of ids; null, an empty list and a missing file name
    none. ConfigError for anything else, and where nobody names one though it is `needed`.
    """
    for name in (GENERATION, "config.json"):
        if ids := _eos_ids(Path(path) / name, tokenizer.eos_token_id):
            return tuple(sorted(set(ids)))
    if tokenizer.eos_token_id is not None:
        return (tokenizer.eos_token_id,)
    if needed:
        raise ConfigError(
            f"model.path = {str(path)!r}: neither {GENERATION} nor config.json nor the tokenizer says which token ends "
            f"an answer; write its id as eos_token_id into {GENERATION}, or set rollout.ignore_eos=true for answers of "
            "rollout.max_tokens"
        )
    return ()


def _eos_ids(file: Path, tokenizers: int | None) -> list[int]:
    value = read_object(file).get("eos_token_id")
    ids = value if isinstance(value, list) else [] if value is None else [value]
    if any(type(i) is not int for i in ids):
        known = f" (the tokenizer's is {tokenizers})" if tokenizers is not None else ""
        raise ConfigError(
            f"{file}: eos_token_id = {json.dumps(value)}: must be a token's id or a list of ids{known}; write them "
            "there, or remove the entry"
        )
    return ids


def check_stop_ids(ids: tuple[int, ...], vocab: int, path: str | Path) -> None:
    """Refuse an end token that the model cannot say: an answer would never end at it."""
    if wrong := [i for i in ids if not 0 <= i < vocab]:
        raise ConfigError(
            f"model.path = {str(path)!r}: answers are to end at token {wrong[0]} (eos_token_id), outside the model's "
            f"vocabulary of {vocab}; name its own end tokens in {GENERATION}"
        )
