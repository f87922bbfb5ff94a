"""Makes this folder's helper (resharding) importable, here and in the ranks."""

from __future__ import annotations

import sys
from pathlib import Path

import flowrl_mega.parallel  # noqa: F401  before any of the helpers imports megatron

sys.path.insert(0, str(Path(__file__).parent))
