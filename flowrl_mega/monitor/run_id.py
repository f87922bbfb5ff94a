"""The name under which a service knows a run, kept in the run folder so that a requeued job goes on with it."""

from __future__ import annotations

import uuid
from pathlib import Path


def run_id(folder: Path, resume: bool) -> str:
    """The stored id when resuming, else a new one, stored."""
    path = folder / "run_id.txt"
    if resume and path.exists() and (stored := path.read_text().strip()):  # nothing: cut off by a kill
        return stored
    folder.mkdir(parents=True, exist_ok=True)
    path.write_text(uuid.uuid4().hex[:8] + "\n")
    return path.read_text().strip()
