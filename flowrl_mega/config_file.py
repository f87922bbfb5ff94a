"""From a YAML file and `--section.field=value` flags to checked settings."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_moves import is_earlier_run, refuse_moved, translated
from flowrl_mega.config_rules import NEEDS, check_together
from flowrl_mega.settings import unread, validated


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The checked settings of a YAML file with `section.field=value` overrides (values are read as YAML)."""
    try:
        tree = yaml.safe_load(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file of settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not a mapping of settings")
    if is_earlier_run(tree):
        tree = _without_unread(translated(tree))
    if isinstance(tree.get("reward"), str):
        tree["reward"] = {"function": tree["reward"]}
    for override in overrides:
        _apply(tree, override)
    refuse_moved(tree)
    config = validated(Config, tree, "")
    check_together(config)
    return config


def _without_unread(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier run without those that nothing read: they were not refused then."""
    for name in unread(validated(Config, tree, ""), NEEDS):
        *sections, field = name.split(".")
        section = tree
        for part in sections:
            section = section[part]
        del section[field]
    return tree


def _apply(tree: dict[str, Any], override: str) -> None:
    """Set one `section.field=value` in the tree."""
    name, found, text = override.lstrip("-").partition("=")
    if not found or not name:
        raise ConfigError(f"{override!r}: not a setting; write --section.field=value")
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    if name == "reward" and isinstance(value, str):
        name = "reward.function"  # the short form sets the function, and its settings stay
    *sections, field = name.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            place = ".".join(sections[: depth + 1])
            raise ConfigError(f"{name} = {text!r}: {place} is a value, not a section; set {place} itself")
    tree[field] = _number(value)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
