"""Where the program of an answer stands: its last block of Python, as LiveCodeBench and Markdown read blocks.

One pass over the lines, in time that grows with the text. Outside a string no line of Python begins with a fence, so
there any fence ends a block, whatever follows it; inside a triple-quoted string it is text.
"""

from __future__ import annotations

import re
import textwrap
from typing import Any

# What may stand before an opening fence: tags such as <answer>, marks of lists and quotes.
BEFORE = r"[ \t]*(?:(?:<[^<>\s`]{1,40}>|[-*+>]|\d{1,9}[.)])[ \t]*)*"
FENCE = re.compile(rf"({BEFORE})(`{{3,}})([^`]*)$")
AFTER_TEXT = re.compile(r"(`{3,})([^`]*)$")
CLOSING = re.compile(r"[ \t]*(`{3,})")
PYTHON = re.compile(r"\{?\.?(?:python|py)(?:3(?:\.\d+)?)?(?![\w+#.-])", re.IGNORECASE)  # py3, python:file.py, {python}
PYTHON_ALONE = re.compile(rf"{PYTHON.pattern}\}}?$", re.IGNORECASE)
THOUGHT = re.compile(r"""(?<!["'])</think>(?!["'])""")  # not the string of a program
TAG = re.compile(r"<[^<>\s]{1,40}>")
TOKEN = re.compile(r"""#.*|'{3}|"{3}|'(?:\\.|[^'\\])*'?|"(?:\\.|[^"\\])*"?""")


def program(response: str, tests: dict[str, Any]) -> str | None:
    """The program of a response: its last block of Python, else its last block without a language.

    What stands before the last </think> is a draft, unless nothing but tags follows. Where the tests have a stub and
    the response no fence at all, all of it, as the stub's completion. None: no program.
    """
    text = _after_thought(response.replace("\r\n", "\n"))
    found = blocks(text)
    for is_python in (True, False):
        for tag, code in reversed(found):
            if bool(PYTHON.match(tag)) if is_python else not tag:
                return code if "stub" in tests else textwrap.dedent(code)
    return text if "stub" in tests and "```" not in text and text.strip() else None


def _after_thought(text: str) -> str:
    ends = [found.end() for found in THOUGHT.finditer(text)]
    return text[ends[-1] :] if ends and TAG.sub("", text[ends[-1] :]).strip() else text


def blocks(text: str) -> list[tuple[str, str]]:
    """The closed blocks of a text: (what follows the opening fence, lines without the fence's own indentation)."""
    lines = text.split("\n")
    found, at = [], 0
    while at < len(lines):
        opening = _opening(lines[at])
        at += 1
        if opening is None:
            continue
        width, ticks, tag = opening
        end, next_at = _end(lines, at, width, ticks, tag)
        if end is not None:
            found.append((tag, _without_margin(lines[at:end], width)))
        at = next_at
    return found


def _opening(line: str) -> tuple[int, int, str] | None:
    """Of an opening fence its column, its length, and what follows. Behind other text it must say that it is Python."""
    if "```" not in line:
        return None
    if fence := FENCE.match(line):
        return len(fence[1]), len(fence[2]), fence[3].strip()
    fence = AFTER_TEXT.search(line, line.index("```"))
    if fence and fence.start() == line.index("```") and PYTHON_ALONE.match(fence[2].strip()):
        return 0, len(fence[1]), fence[2].strip()
    return None


def _end(lines: list[str], start: int, width: int, ticks: int, tag: str) -> tuple[int | None, int]:
    """The line of a block's closing fence (None: never closed), and the line after it to go on with.

    A block that is begun again without having been closed ends nowhere. A string that never ends, or holds a closing
    fence and then another block of Python, was none: the first fence in it that may close the block does.
    """
    inside: str | None = None  # the quotes of the string that a line begins in
    in_string: int | None = None  # the first fence in it that might be the closing one
    reads_strings = not tag or bool(PYTHON.match(tag))
    for at in range(start, len(lines)):
        line = lines[at]
        closing = CLOSING.match(line) if "```" in line else None
        if closing and len(closing[1]) >= ticks:
            begins = bool(PYTHON.match(line[closing.end() :].strip()))
            if inside is None:
                return (None, at) if begins else (at, at + 1)
            if begins and in_string is not None:
                break
            if not begins and in_string is None and closing.start(1) <= width:
                in_string = at
        if reads_strings:
            inside = _inside(line, inside)
            in_string = in_string if inside else None
    return (None, len(lines)) if in_string is None else (in_string, in_string + 1)


def _inside(line: str, quotes: str | None) -> str | None:
    """The quotes of the triple-quoted string that the end of a line is in, if any."""
    at = 0
    while True:
        if quotes:  # no escapes: a string is then as long, but where a backslash stands before its last quotes
            end = line.find(quotes, at)
            if end < 0:
                return quotes
            quotes, at = None, end + 3
        token = TOKEN.search(line, at)
        if token is None:
            return None
        at = token.end()
        quotes = token[0] if token[0] in ("'''", '"""') else None


def _without_margin(lines: list[str], width: int) -> str:
    """The lines, without what indents the fence, where the first of them has it."""
    first = next((line for line in lines if line.strip()), "")
    if not first[:width].strip():
        lines = [line[: len(line) - len(line.lstrip(" \t"))][width:] + line.lstrip(" \t") for line in lines]
    return "".join(line + "\n" for line in lines)
