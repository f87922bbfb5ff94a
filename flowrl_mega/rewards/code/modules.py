"""Whether programs can import what the tests of the data import, asked before a run begins."""

from __future__ import annotations

import json
from collections.abc import Set

from flowrl_mega.config import CodeSettings, ConfigError
from flowrl_mega.rewards.code.judge import Runner

IMPORTS = """
import importlib, json
missing = {{}}
for name in {}:
    try:
        importlib.import_module(name)
    except BaseException as error:
        missing[name] = f"{{type(error).__name__}}: {{error}}"
print(json.dumps(missing))
"""


def check_modules(runner: Runner, modules: Set[str], settings: CodeSettings) -> None:
    """Raises ConfigError for those that a first program cannot import: no answer to their rows could be graded."""
    if not modules:
        return
    outcome = runner.run(IMPORTS.format(sorted(modules)), "")
    try:
        missing = json.loads(outcome.stdout)
    except ValueError:  # one of them ended the interpreter
        said = f"a program that imports them ended by {outcome.end} {outcome.code}: {outcome.stderr.strip()[-200:]}"
        missing = dict.fromkeys(sorted(modules), said)
    if missing:
        setting, fix = _fix(list(missing), settings)
        raise ConfigError(
            f"{setting}: the tests of the data import {', '.join(missing)}, and programs cannot "
            f"({next(iter(missing.values()))}); {fix}, or leave out those rows"
        )


def _fix(missing: list[str], settings: CodeSettings) -> tuple[str, str]:
    """The setting that decides what programs can import, with its value, and what to do."""
    if settings.url:
        return f"reward.code.url = {settings.url!r}", "install it in that sandbox"
    if settings.python:
        return f"reward.code.python = {settings.python!r}", "install it there"
    more = ",".join(dict.fromkeys([*settings.packages, *missing]))
    return (
        f"reward.code.packages = [{','.join(settings.packages)}]",
        f"install it here and set reward.code.packages=[{more}], or give an interpreter with it as reward.code.python",
    )
