"""Holds out prompts for evaluation."""

from __future__ import annotations

import hashlib

import numpy as np

from flowrl_mega.config import ConfigError
from flowrl_mega.data.loader import Subset
from flowrl_mega.data.order import permutation
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.data.store import MappedStore


def split(prompts: Prompts, share: float, seed: int) -> tuple[Prompts, Prompts]:
    """(training prompts, held-out prompts): the fraction `share` of the distinct prompts is held out, at least one.

    Equal prompts (the same token ids) stay on one side, so that no held-out prompt is ever trained on; both sides keep
    the order of `prompts`.
    """
    keys = _keys(prompts)
    distinct = list(dict.fromkeys(keys))
    count = max(1, round(share * len(distinct)))
    if count >= len(distinct):
        raise ConfigError(
            f"data.held_out = {share}: leaves nothing to train on ({len(distinct)} distinct prompts); "
            "lower it or add prompts"
        )
    chosen = {distinct[i] for i in permutation(seed, 0, len(distinct))[:count]}
    held_out = np.array([key in chosen for key in keys])
    train, test = (Subset(prompts, np.flatnonzero(which)) for which in (~held_out, held_out))
    return train, test


def _keys(prompts: Prompts) -> list[bytes]:
    """One key per prompt, equal for equal token ids. Does not read rows."""
    if isinstance(prompts, MappedStore):
        ids = (prompts.tokens(i).astype(np.int64).tobytes() for i in range(len(prompts)))
    else:
        ids = (np.asarray(prompt.token_ids, np.int64).tobytes() for prompt in prompts)
    return [hashlib.blake2b(data, digest_size=16).digest() for data in ids]
