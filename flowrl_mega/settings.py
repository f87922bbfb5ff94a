"""How settings are built and checked: the base class of every section, and errors that name the field and the fix."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError


class ConfigError(ValueError):
    """The input or the settings are wrong; the command line shows the message and exits with 2."""


class RunError(RuntimeError):
    """A run cannot go on, and the reason is not in the code; the command line shows the message and exits with 70."""


class Diverged(RunError):
    """Training has come to numbers that are not finite: another learning rate or other rewards, and no repair, help."""


class Settings(BaseModel):
    """A section of settings: unknown names are refused and values do not change after the check."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, validate_default=True, allow_inf_nan=False, protected_namespaces=()
    )


S = TypeVar("S", bound=Settings)


def path(text: str) -> str:
    """Made whole here, since no shell sees a `~` in YAML or after the = of a flag."""
    if not text:
        raise ValueError("must not be empty")
    whole = os.path.expanduser(text)
    if whole.startswith("~"):
        raise ValueError(f"no such user has a home folder; for a name that begins with ~ write ./{text}")
    return whole


PathText = Annotated[str, AfterValidator(path)]  # of a file or folder, also as in path/to/file.py:name; ~ is the home


@dataclass(frozen=True)
class Needs:
    """Fields, or whole sections, that are read only where another setting has a certain value."""

    fields: str  # dotted names, separated by spaces
    setting: str  # what to set for them to be read, in words
    holds: Callable[[Any], bool]  # of the settings that have these fields: whether they are read


def unread(settings: Settings, table: Sequence[Needs]) -> dict[str, str]:
    """The fields that are not at their defaults although nothing reads them, and the setting that each needs."""
    idle = {field: rule.setting for rule in table if not rule.holds(settings) for field in rule.fields.split()}
    return {
        name: setting
        for name in changed(settings)
        for field, setting in idle.items()
        if f"{name}.".startswith(f"{field}.")
    }


def refuse_unread(settings: Settings, table: Sequence[Needs], where: str = "") -> None:
    """Raises ConfigError for every field whose value would change nothing: it would pass for a choice that was made."""
    values, place = changed(settings), f"{where}." if where else ""
    faults = [
        f"{place}{name} = {values[name]!r}: is read with {setting} only; set that, or leave this out"
        for name, setting in unread(settings, table).items()
    ]
    if faults:
        raise ConfigError("\n".join(faults))


def changed(settings: Settings) -> dict[str, Any]:
    """The values that are not the defaults, by dotted name."""
    defaults = {
        name: field.get_default(call_default_factory=True) for name, field in type(settings).model_fields.items()
    }
    return _differences(settings, defaults)


def _differences(settings: Settings, defaults: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in settings:
        if isinstance(value, Settings):
            default = defaults[name]
            inner = _differences(value, dict(default)) if isinstance(default, Settings) else changed(value)
            found |= {f"{name}.{field}": different for field, different in inner.items()}
        elif value != defaults[name]:
            found[name] = value
    return found


def validated(model: type[S], mapping: Any, where: str) -> S:
    """`model` built from a mapping; `where` is the dotted place of the mapping in the tree ('' at the top)."""
    if not isinstance(mapping, dict):
        raise ConfigError(f"{where or 'the settings'} = {mapping!r}: must be a mapping of names to values")
    try:
        return model.model_validate(mapping)
    except ValidationError as error:
        faults: dict[str, str] = {}  # one a field: pydantic tells of each branch of a union
        for details in error.errors():
            field, message = _explain(model, details, where)
            faults[field] = f"{faults[field]}, or {details['msg'].lower()}" if field in faults else message
    raise ConfigError("\n".join(faults.values()))


def _explain(model: type[Settings], details: Any, where: str) -> tuple[str, str]:
    """The field that one pydantic error is about, and a line with field, value and fix."""
    location = _own_names(model, details["loc"])
    field = ".".join([where, *location] if where else location)
    if details["type"] == "extra_forbidden":
        names = _names_at(model, location[:-1])
        return field, f"{field}: no such setting; {nearest(location[-1], names)}"
    if details["type"] == "missing" and isinstance(details["loc"][-1], str):
        return field, f"{field}: missing; set it in the YAML file or with --{field}=VALUE"
    message = details["msg"].removeprefix("Value error, ")  # what pydantic puts before a message of ours
    return field, f"{field} = {details['input']!r}: {message[0].lower()}{message[1:]}"


def _own_names(model: type[Settings], location: tuple[str | int, ...]) -> list[str]:
    """A pydantic location without the branch names of unions, which follow the field's own name."""
    for depth, part in enumerate(location):
        section = section_of(model, str(part))
        if section is None:
            places = [place for place in location[depth + 1 :] if isinstance(place, int)]
            return [str(p) for p in (*location[: depth + 1], *places)]
        model = section
    return [str(part) for part in location]


def section_of(model: type[Settings] | None, field: str) -> type[Settings] | None:
    """The settings that are a field's own, also where null may stand in their place."""
    annotation = model.model_fields[field].annotation if model and field in model.model_fields else None
    kinds = [kind for kind in (get_args(annotation) or (annotation,)) if kind is not type(None)]
    return kinds[0] if len(kinds) == 1 and isinstance(kinds[0], type) and issubclass(kinds[0], Settings) else None


def kinds_of(model: type[Settings] | None, field: str) -> set[Any]:
    """The types that a field takes, without what is annotated to them; none where there is no such field."""
    if model is None or field not in model.model_fields:
        return set()
    annotation = model.model_fields[field].annotation
    kinds = get_args(annotation) if get_origin(annotation) in (Union, UnionType) else (annotation,)
    return {get_args(kind)[0] if get_origin(kind) is Annotated else kind for kind in kinds}


def _names_at(model: type[Settings], path: list[str]) -> list[str]:
    """The setting names of the section at `path`."""
    for part in path:
        model = section_of(model, part) or model
    return list(model.model_fields)


def nearest(name: str, names: list[str]) -> str:
    """The words of a near miss: the known name that was probably meant, or all of them."""
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    return f"did you mean {close[0]!r}?" if close else f"known: {', '.join(sorted(names))}"


def flat(tree: Mapping[str, Any], place: str = "") -> dict[str, Any]:
    """The values of a tree of mappings by dotted name; an empty mapping is a value."""
    found: dict[str, Any] = {}
    for name, value in tree.items():
        inner = isinstance(value, Mapping) and value
        found |= flat(value, f"{place}{name}.") if inner else {f"{place}{name}": value}
    return found
