"""JSON files of a model folder, which others wrote and edit by hand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError


def read_object(file: Path) -> dict[str, Any]:
    """The object in `file`; {} where there is no such file. ConfigError for anything else that it may hold."""
    if not file.is_file():
        return {}
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:  # with a byte order mark too, which transformers refuses as well
        raise ConfigError(f"{file}: not valid JSON ({error}); get the model folder again") from None
    if not isinstance(found, dict):
        raise ConfigError(f"{file}: holds {json.dumps(found):.40}, not a JSON object; get the model folder again")
    return found
