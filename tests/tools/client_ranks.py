"""What a rank runs to measure our client as tools/benchmarks/client.py does."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "tools" / "benchmarks"))

import client  # noqa: E402


def ours(model: str, url: str, folder: Path, kind: str) -> float:
    """Output tokens per second of four prompts."""
    few = ["--prompts", "4", "--prompt-tokens", "4", "--tokens", "4", "--concurrency", "2"]
    engine = getattr(client, kind)(client.parser().parse_args(["--model", model, "--python", "-", *few]), url, folder)
    try:
        return engine.run(1)
    finally:
        engine.close()
