"""Prompts from reasoning-gym: more than a hundred procedural tasks, each with a scorer (https://github.com/open-thought/reasoning-gym).

`make_rows` draws problems of one task, `write_jsonl` puts them where `data.path` finds them, and
`flowrl_mega.rewards.reasoning_gym:score` gives the reward.
"""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError


def make_rows(task: str, size: int, seed: int, **task_config: Any) -> list[dict[str, Any]]:
    """`size` problems of `task`; the same arguments give the same rows.

    A row is {"prompt": the question, "answer": one right answer, "task": the task's name, "entry": the library's own
    record, which its scorer reads}, all of it JSON. `task_config` goes to the library unchanged (e.g. max_digits=1).
    Raises ConfigError when the library is absent or refuses the task or its settings.
    """
    try:
        import reasoning_gym
    except ImportError as error:
        raise ConfigError("reasoning-gym is not installed; fix: pip install flowrl-mega[example]") from error
    try:
        dataset = reasoning_gym.create_dataset(task, size=size, seed=seed, **task_config)
    except (ValueError, TypeError, AssertionError) as error:  # unknown task, unknown setting, value out of range
        raise ConfigError(f"reasoning-gym task {task!r} with {task_config}: {error}") from error
    rows = []
    for index in range(size):
        item = dataset[index]
        rows.append({"prompt": item["question"].strip(), "answer": item["answer"], "task": task, "entry": item})
    return [_json_safe(row) for row in rows]


def _json_safe(row: dict[str, Any]) -> dict[str, Any]:
    """The row as it will be read back from a file, so that a scorer sees the same types in tests and in training."""
    try:
        return json.loads(json.dumps(row))
    except TypeError as error:
        raise ConfigError(
            f"reasoning-gym task {row['task']!r} has records that JSON cannot hold ({error}); choose another task"
        ) from error


def write_jsonl(rows: Iterable[dict[str, Any]], path: Path) -> None:
    """One JSON object a line; the file appears under its name only when it is complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.partial-{os.getpid()}")
    with partial.open("w", encoding="utf-8") as file:
        file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    os.replace(partial, path)
