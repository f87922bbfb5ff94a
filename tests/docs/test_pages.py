"""README.md and docs/: links lead somewhere, and every `flowrl-mega` and `make` command can be given.

A command's settings are checked as the command checks them before it starts anything; a path or a number that a page
leaves open (`...`, CONFIG.yaml) is filled in.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flowrl_mega import cli
from flowrl_mega.config_file import load_config, load_eval_config

REPO = Path(__file__).parents[2]
PAGES = [REPO / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")] + sorted(
    (REPO / "docs").rglob("*.md")
)
LINK = re.compile(r"!?\[[^\]]*\]\(([^)\s]+)\)")
# In a block of code or in a sentence; a command that goes on in the next line ends with a backslash.
COMMAND = re.compile(r"(?:^ {4,}|`)((?:\.venv/bin/|sbatch [^`\n]*|)?(?:flowrl-mega [a-z]|make [a-z])[^`\n]*)", re.M)
OPEN = {name: "examples/smollm2.yaml" for name in ("CONFIG.yaml", "config.yaml")}


def text_of(page: Path) -> str:
    """Without blocks of Python, where [x](y) is no link."""
    return re.sub(r"```.*?```", "", page.read_text(), flags=re.S)


def anchors(page: Path) -> set[str]:
    """As GitHub makes them of the headings."""
    heads = re.findall(r"^#+ (.*)$", text_of(page), re.M)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(REPO)))
def test_links_lead_somewhere(page: Path) -> None:
    for link in LINK.findall(text_of(page)):
        if link.startswith("http"):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        assert target.is_relative_to(REPO), f"{page.name}: {link} leaves the project"
        assert not anchor or anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_can_be_reached_from_the_readme() -> None:
    reached, todo = set[Path](), [REPO / "README.md"]
    while todo:
        page = todo.pop()
        if page in reached or page.suffix != ".md":
            continue
        reached.add(page)
        links = (link.partition("#")[0] for link in LINK.findall(text_of(page)) if not link.startswith("http"))
        todo += [(page.parent / link).resolve() for link in links if link]
    lost = sorted(str(page.relative_to(REPO)) for page in set(PAGES) - reached)
    assert not lost


def test_the_readme_is_one_page() -> None:
    assert len((REPO / "README.md").read_text().splitlines()) <= 150


def commands() -> list[tuple[str, str]]:
    found = []
    for page in PAGES:
        text = re.sub(r"\\\n\s*", "", text_of(page))
        found += [(page.name, command.strip()) for command in COMMAND.findall(text)]
    return found


@pytest.mark.parametrize(("page", "command"), commands(), ids=[f"{page}: {line}" for page, line in commands()])
def test_a_command_can_be_given(page: str, command: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "x"}\n')
    words = [OPEN.get(word, word) for word in shlex.split(command, comments=True)]
    if words[0] == "make":
        for target in (word for word in words[1:] if "=" not in word):
            assert re.search(rf"^{re.escape(target)}:", (REPO / "Makefile").read_text(), re.M), command
        return
    arguments = words[1:]
    if len(arguments) == 1:  # no command line, but the command's name
        with pytest.raises(SystemExit) as ended:
            cli._parser().parse_args([*arguments, "--help"])
        assert ended.value.code == 0
        return
    if arguments[0] == "eval" and arguments[1] == "...":
        arguments[1] = "examples/eval.yaml"
    options, overrides = cli._parser().parse_known_args(arguments)
    if options.command in ("train", "serve"):
        load_config(options.config, [*overrides, f"--data.path={prompts}"])
    elif options.command == "eval":
        load_eval_config(options.config, ["--model.path=path/to/model", *overrides])
    else:
        assert options.command in ("ablate", "quickstart") or not overrides, command


def test_the_commands_are_found() -> None:
    found = {line.split()[1] for _, line in commands() if "flowrl-mega" in line}
    assert {"train", "eval", "ablate", "reproduce", "report", "serve"} <= found
    assert len([line for _, line in commands() if line.startswith("make ")]) > 20
