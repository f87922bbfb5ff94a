"""From a YAML file and `--section.field=value` flags to checked settings."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import yaml

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_eval import EvalConfig, check_evaluation
from flowrl_mega.config_moves import is_earlier_run, refuse_moved, translated
from flowrl_mega.config_rules import NEEDS, check_together
from flowrl_mega.settings import S, Settings, kinds_of, section_of, unread, validated


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """The checked settings of a run: a YAML file with `section.field=value` overrides (values are read as YAML)."""
    tree = _read_tree(path, Config)
    if is_earlier_run(tree):
        tree = _without_unread(translated(tree))
    config = _overridden(tree, overrides, Config)
    check_together(config)
    return config


def load_eval_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> EvalConfig:
    """The checked settings of an evaluation, as `load_config`."""
    config = _overridden(_read_tree(path, EvalConfig), overrides, EvalConfig)
    check_evaluation(config)
    return config


def _read_tree(path: str | Path, model: type[Settings]) -> dict[str, Any]:
    try:
        tree, written = read_yaml(Path(path).read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; give the path of a YAML file of settings") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({error})") from None
    except yaml.YAMLError as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(tree, dict):
        raise ConfigError(f"{path}: holds {type(tree).__name__}, not a mapping of settings")
    return _with_texts(tree, written, model)


def _overridden(tree: dict[str, Any], overrides: Sequence[str], model: type[S]) -> S:
    """The settings of a tree, each checked alone, after the overrides."""
    if isinstance(tree.get("reward"), str):
        tree["reward"] = {"function": tree["reward"]}
    for override in overrides:
        _apply(tree, override, model)
    refuse_moved(tree)
    return validated(model, tree, "")


def _without_unread(tree: dict[str, Any]) -> dict[str, Any]:
    """The settings of an earlier run without those that nothing read: they were not refused then."""
    for name in unread(validated(Config, tree, ""), NEEDS):
        *sections, field = name.split(".")
        section = tree
        for part in sections:
            section = section[part]
        del section[field]
    return tree


def _apply(tree: dict[str, Any], override: str, model: type[Settings]) -> None:
    """Set one `section.field=value` in the tree."""
    name, found, text = override.lstrip("-").partition("=")
    if not found or not name:
        raise ConfigError(f"{override!r}: not a setting; write --section.field=value")
    value = read_value(name, text, model)
    if name == "reward" and not isinstance(value, dict | None):
        name = "reward.function"  # the short form sets the function, and its settings stay
        value = read_value(name, text, model)
    *sections, field = name.split(".")
    for depth, section in enumerate(sections):
        tree = tree.setdefault(section, {})
        if not isinstance(tree, dict):
            place = ".".join(sections[: depth + 1])
            raise ConfigError(f"{name} = {text!r}: {place} is a value, not a section; set {place} itself")
    tree[field] = value


def read_value(name: str, text: str, model: type[Settings] = Config) -> Any:
    """What a flag gives to the setting `name`: YAML, or where the setting is a text this text as it is written."""
    section, kinds = _place(name, model)
    try:
        value, written = read_yaml(text)
    except yaml.YAMLError:
        return text
    if section or str not in kinds:
        return with_texts(name, _number(value), written, model)
    text = text.strip()
    if text.lower() in ("", "~", "null"):
        return None
    if text[0] in "\"'" and isinstance(value, str):  # YAML's quotes
        return value
    return _as_text(_number(value), text, kinds) if float in kinds else text  # with what YAML takes for a comment


def with_texts(name: str, value: Any, written: Any, model: type[Settings] = Config) -> Any:
    """The `value` that YAML has read for the setting or section `name`, and where a text is wanted what is `written`:
    2024-01-01, 007 and yes are names of folders, too."""
    section, kinds = _place(name, model)
    return _with_texts(value, written, section) if section else _as_text(value, written, kinds)


def _place(name: str, model: type[Settings]) -> tuple[type[Settings] | None, set[Any]]:
    """The section that a dotted name is of, if any, and the types that a setting of this name takes."""
    *sections, field = name.split(".")
    place: type[Settings] | None = model
    for section in sections:
        place = section_of(place, section)
    return section_of(place, field), kinds_of(place, field)


def _with_texts(value: Any, written: Any, model: type[Settings]) -> Any:
    if not isinstance(value, dict):
        return value
    found = {}
    for name, item in value.items():
        text, section = written.get(name, item), section_of(model, name)
        found[name] = _with_texts(item, text, section) if section else _as_text(item, text, kinds_of(model, name))
    return found


def _as_text(value: Any, text: Any, kinds: set[Any]) -> Any:
    """`text` where YAML took the text of a setting of these kinds for something else, and that is none of them."""
    if str not in kinds or not isinstance(value, bool | int | float | date):
        return value
    return value if float in kinds and type(value) in (int, float) else text


class _Typed(yaml.SafeLoader):
    """YAML; what only looks like a number or a date (2024-13-01) is text."""


def _or_text(kind: str) -> None:
    construct = yaml.SafeLoader.yaml_constructors[kind]

    def constructed(loader: _Typed, node: yaml.ScalarNode) -> Any:
        try:
            return construct(loader, node)
        except ValueError:
            return node.value

    _Typed.add_constructor(kind, constructed)


for _kind in ("int", "float", "timestamp"):
    _or_text(f"tag:yaml.org,2002:{_kind}")


class _AsWritten(yaml.SafeLoader):
    """Reads every plain scalar but null as the text that it is."""

    yaml_implicit_resolvers = {
        first: [(tag, form) for tag, form in pairs if tag.endswith((":null", ":merge"))]
        for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }


def read_yaml(text: str) -> tuple[Any, Any]:
    """The tree that a YAML text is, and the same tree with every plain scalar as it is written."""
    return yaml.load(text, _Typed), yaml.load(text, _AsWritten)


def _number(value: Any) -> Any:
    """YAML 1.1 reads 1e-6 as text; people mean the number."""
    if isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value
