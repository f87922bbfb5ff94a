"""Whether a run still has the data that it began with."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import numpy as np

from flowrl_mega.data.loader import whole
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.data.store import MappedStore


def digest(prompts: Prompts) -> dict[str, Any]:
    """The whole data set that `prompts` are taken from, in plain values: how many, and SHA-256 of what decides.

    {"count", "tokens": of all ids one after the other, "rows": of what rewards read}. A store's header knows them; a
    store and the JSON lines that it was made from count as different data.
    """
    data = whole(prompts)
    if isinstance(data, MappedStore):
        files = data.header["files"]
        sums = {name: files[file]["sha256"] for name, file in (("tokens", "tokens.bin"), ("rows", "rows.jsonl"))}
        return {"count": len(data), **sums}
    tokens, rows = hashlib.sha256(), hashlib.sha256()
    for prompt in data:
        tokens.update(np.asarray(prompt.token_ids, np.uint32).tobytes())
        rows.update(json.dumps(prompt.row, sort_keys=True, default=repr).encode())
    return {"count": len(data), "tokens": tokens.hexdigest(), "rows": rows.hexdigest()}
