"""Every command that README.md, docs/ and the benchmarks' results name is one that its script would take."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from scripts import REPO, commands, is_module, parser_of

pytestmark = pytest.mark.tools

PAGES = [REPO / "README.md", *sorted((REPO / "docs").rglob("*.md")), REPO / "tools/benchmarks/results/README.md"]
RESULTS = sorted((REPO / "tools/benchmarks/results").glob("*.json"))
# At the start of a line of code or of `code` in a sentence, which may be broken: the whole of either.
COMMAND = re.compile(r"(?:^ {4,}|`)((?:\.venv/bin/)?(?:python3? (?:-m )?)?(?:tools|examples)[/.][^`\n]*(?:`|$))", re.M)


def documented() -> list[tuple[str, str]]:
    """(where, command line) of each."""
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", page.read_text())  # a line that goes on
        text = re.sub(r"`[^`\n]+\n[^`\n]+`", lambda broken: broken[0].replace("\n", " "), text)
        found += [(page.name, line.rstrip("`")) for line in COMMAND.findall(text)]
    for file in RESULTS:
        command = json.loads(file.read_text()).get("machine", {}).get("command")  # a few are a make target's
        found += [(file.name, command)] if command else []
    return [(where, line) for where, line in found if is_command_line(line)]


def is_command_line(line: str) -> bool:
    """Not the name of a file or folder."""
    return line.startswith(("python", ".venv")) or bool(re.match(r"\S+\.sh\b", line))


def split(line: str) -> tuple[Path, list[str]]:
    """The script, relative to the repository, and its arguments; a comment at the end is left out."""
    words = shlex.split(line, comments=True)
    words = words[1:] if "python" in words[0] else words
    if words[0] == "-m":
        return Path(*words[1].split(".")).with_suffix(".py"), words[2:]
    return Path(words[0]), words[1:]


@pytest.mark.parametrize(("where", "line"), documented(), ids=[where for where, _ in documented()])
def test_a_documented_command_can_be_given(where: str, line: str) -> None:
    script, arguments = split(line)
    assert script in commands()
    overrides = [word for word in arguments if is_module(script) and re.match(r"--\w+\.", word)]
    parser_of(script).parse_args([word for word in arguments if word not in overrides])


def test_the_commands_are_found() -> None:
    """The pages have some of every form; a pattern that finds none would let everything pass."""
    found = {split(line)[0].name for _, line in documented()}
    assert {"convert_ckpt.py", "gpu_wheels.sh", "step.py", "run.py", "against_trl.py"} <= found
    assert len(documented()) > 25
