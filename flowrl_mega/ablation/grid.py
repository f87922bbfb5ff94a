"""The grid language of `--vary`: from its text to cells, each with a name and checked settings."""

from __future__ import annotations

import hashlib
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.config_file import load_config, read_yaml, with_texts

LONGEST_NAME = 120  # of a cell: file systems allow 255 bytes
Choice = dict[str, Any]  # dotted names of settings and their values


@dataclass(frozen=True)
class Cell:
    """One choice of the varied settings; `config` has the first seed, and the grid's run_dir."""

    name: str
    settings: Choice
    config: Config


def read_axes(vary: Sequence[str], overrides: Sequence[str] = ()) -> list[list[Choice]]:
    """One axis for each `--vary`. ConfigError if a setting is given twice, in `overrides` or on another axis."""
    axes = [read_axis(text) for text in vary]
    given = [override.lstrip("-").partition("=")[0] for override in overrides]
    for name in [name for axis in axes for name in axis[0]]:
        if name in given:
            raise ConfigError(f"--vary {name}: this setting is given twice; say it once")
        if name in ("seed", "run_dir"):
            fix = "give --seeds N, and the first with --seed=K" if name == "seed" else "each run gets its own"
            raise ConfigError(f"--vary {name}: cannot be varied; {fix}")
        given.append(name)
    return axes


def read_axis(text: str) -> list[Choice]:
    """The choices that one `--vary` lists: "NAME=V1,V2,..." or "NAME=[V1, V2, ...]", with values in YAML.

    "NAME1+NAME2=[[V1, V2], ...]" is for settings that change together: each choice lists one value per name.
    """
    form = "write --vary NAME=V1,V2,... or, for values with commas, --vary 'NAME=[V1, V2, ...]'"
    name, equals, listed = text.partition("=")
    names = name.split("+")
    if not equals or not all(names):
        raise ConfigError(f"--vary {text}: not a setting and its values; {form}")
    values = _read_values(listed)
    if not values:
        raise ConfigError(f"--vary {text}: its values are empty or not YAML; {form}")
    if len(names) == 1:
        return [{name: with_texts(name, value, written)} for value, written in values]
    for value, _ in values:
        if not isinstance(value, list) or len(value) != len(names):
            raise ConfigError(f"--vary {text}: {value!r} is no list of {len(names)} values, one for each of {name}")
    return [dict(zip(names, map(with_texts, names, *both), strict=True)) for both in values]


def _read_values(listed: str) -> list[tuple[Any, Any]]:
    """The values in "V1, V2" or "[V1, V2]", each also as it is written; empty where one is missing, or the text is not
    YAML."""
    if listed.rstrip().endswith(","):  # YAML would ignore the comma; the user has probably lost a value
        return []
    try:
        values, written = read_yaml(f"[{listed}]")
    except yaml.YAMLError:
        return []
    has_own_brackets = len(values) == 1 and isinstance(values[0], list)
    return list(zip(*((values[0], written[0]) if has_own_brackets else (values, written)), strict=True))


def grid(path: str, overrides: Sequence[str], axes: Sequence[Sequence[Choice]]) -> list[Cell]:
    """The product of all axes, the last one fastest, as checked settings; no two cells may be the same."""
    choices = [{name: part[name] for part in parts for name in part} for parts in itertools.product(*axes)]
    cells: list[Cell] = []
    for name, settings in zip(cell_names(choices), choices, strict=True):
        varied = [f"{setting}={json.dumps(value, default=str)}" for setting, value in settings.items()]
        try:
            config = load_config(path, [*overrides, *varied])
        except ConfigError as error:
            raise ConfigError(f"cell {name}: {error}") from None
        for cell in cells:
            if cell.config == config:
                raise ConfigError(f"--vary: cells {cell.name} and {name} have the same settings; leave one out")
        cells.append(Cell(name, settings, config))
    return cells


def cell_names(choices: Sequence[Choice]) -> list[str]:
    """A folder name for each cell: "weight=paper,lr=1e-6"; whole dotted names where the last parts are the same.

    A name that is too long, or another cell's too once odd characters are replaced, ends in a hash of its settings.
    """
    settings = list(choices[0])
    last = [setting.rpartition(".")[2] for setting in settings]
    short = {setting: part if last.count(part) == 1 else setting for setting, part in zip(settings, last, strict=True)}
    names = [",".join(f"{short[name]}={_word(value)}" for name, value in choice.items()) for choice in choices]
    return [
        name if len(name) <= LONGEST_NAME and names.count(name) == 1 else f"{name[:LONGEST_NAME]}-{_hash(choice)}"
        for name, choice in zip(names, choices, strict=True)
    ]


def _word(value: Any) -> str:
    """A value as part of a file name; a mapping's `name` goes without its key, and {} means the defaults."""
    if isinstance(value, Mapping):
        return "-".join(_word(v) if key == "name" else f"{key}={_word(v)}" for key, v in value.items()) or "default"
    if isinstance(value, list):
        return "-".join(map(_word, value))
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return re.sub(r"[^\w.=+-]+", "-", text).strip("-") if isinstance(value, str) else text


def _hash(choice: Choice) -> str:
    return hashlib.sha256(json.dumps(choice, default=str).encode()).hexdigest()[:8]
