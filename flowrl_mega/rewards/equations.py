"""How an answer is put together, read from its text: lists, equations, names that are given a value.

From the text, since a parser no longer tells I = 5 from a statement about the imaginary unit, nor 1 = 1 from 5 = 5.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

OPEN, CLOSE = "([{", ")]}"
AND = (
    r"\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or)\s*\}"
    r"|(?<![a-zA-Z])(?:and|or)(?![a-zA-Z])|\\l(?:and|or)(?![a-z])"
)
TOKEN = re.compile(rf"(?P<and>{AND})|\\[a-zA-Z]+|\\.|[()\[\]{{}}]|[,;]|=|<|>")
SIZES = re.compile(r"\\left|\\right|\\[bB]ig+[lr]?")
# Relations other than equality; with one of them it is no equation.
OTHER = set(r"< > \le \leq \ge \geq \ne \neq \in \equiv \sim \lt \gt \subset \mid \approx \leqslant \geqslant".split())

GREEK = """alpha|beta|gamma|delta|epsilon|varepsilon|zeta|eta|theta|vartheta|iota|kappa|lambda|mu|nu|xi|pi|rho|sigma|tau
phi|varphi|chi|psi|omega|Gamma|Delta|Theta|Lambda|Xi|Pi|Sigma|Phi|Psi|Omega|ell|hbar""".replace("\n", "|")
ACCENTS = "vec|hat|bar|tilde|overline|overrightarrow|mathbf|mathcal|mathrm|text|mathbb|operatorname"
INDEX = r"(?:_(?:\{[^{}]*\}|\\?\w+))?"
LETTER = rf"(?:\\(?:{GREEK})|[A-Za-z]){INDEX}'*"
MARKED = rf"\\(?:{ACCENTS})\s*\{{[^{{}}]*\}}{INDEX}'*"
FIGURE = r"(?:\\(?:angle|triangle)\s*)?[A-Z]{2,4}"
CALL = rf"(?:{LETTER}|{MARKED})(?:\^\{{-1\}})?\s*\([^()=]*\)"
NAME = re.compile(rf"(?:{LETTER}|{MARKED}|{FIGURE}|\\angle\s*[A-Z]|{CALL})")


@dataclass(frozen=True)
class Assignment:
    """`name = value`."""

    name: str
    value: str


def items(text: str) -> list[str]:
    """What stands between the commas, semicolons, "and" and "or" that no bracket encloses."""
    return _split(text, lambda token: token[0] in ",;" or token["and"] is not None)


def sides(text: str) -> list[str] | None:
    """The sides of an equation or of a chain of them; None for anything else, an inequality or a list for example."""
    if "=" not in text or len(items(text)) > 1:
        return None
    tokens = [token[0] for token in TOKEN.finditer(text)]
    if OTHER & set(tokens) or ":=" in text or "==" in text or "\\not" in tokens:
        return None
    found = [side.removesuffix("&").removeprefix("&").strip() for side in _split(text, lambda token: token[0] == "=")]
    return found if len(found) > 1 and all(found) else None


def assignment(text: str) -> Assignment | None:
    """`name = value`, or a chain that begins with a name: its last side; or `value = name`."""
    found = sides(text)
    if found is None:
        return None
    if is_name(found[0]):
        return Assignment(_bare(found[0]), found[-1])
    if len(found) == 2 and is_name(found[1]):
        return Assignment(_bare(found[1]), found[0])
    return None


def assignments(text: str) -> list[Assignment] | None:
    """x=3, y=4 or (x,y)=(3,4): at least two names, each with its value; None for anything else."""
    found = sides(text)
    if found is not None and len(found) == 2:
        names, values = elements(found[0]), elements(found[1])
        if names and values and len(names) == len(values) > 1 and all(map(is_name, names)):
            return [Assignment(_bare(name), value) for name, value in zip(names, values, strict=True)]
    each = [assignment(item) for item in items(text)]
    got = [item for item in each if item is not None]
    return got if len(each) == len(got) > 1 and len({item.name for item in got}) == len(got) else None


def values_of_one_name(text: str) -> str | None:
    """ "1, 2" of "x = 1 or x = 2" and of "x = 1, 2"; None where there is no such list."""
    each = [assignment(item) for item in items(text)]
    if len(each) < 2 or each[0] is None:
        return None
    got = [item for item in each if item is not None]
    if len(got) == 1:
        return ", ".join([got[0].value, *items(text)[1:]])
    return ", ".join(item.value for item in got) if len(got) == len(each) and len({i.name for i in got}) == 1 else None


def elements(text: str) -> list[str] | None:
    """The elements of a tuple in round brackets, in order; None for anything else."""
    text = SIZES.sub("", text).strip()
    return items(text[1:-1]) if len(text) > 2 and text[0] == "(" and _closes_last(text) else None


def is_name(text: str) -> bool:
    """A letter (I, e and \\pi too) with its index, f(x), AB, \\angle A, or words in \\text."""
    return NAME.fullmatch(SIZES.sub("", text).strip()) is not None


def _bare(name: str) -> str:
    return re.sub(r"[\s{}]|\\text|\\mathrm", "", SIZES.sub("", name))


def _split(text: str, is_mark) -> list[str]:  # type: ignore[no-untyped-def]
    depth, start, parts = 0, 0, []
    for token in TOKEN.finditer(text):
        if token[0] in OPEN or token[0] in ("\\begin", "\\{"):
            depth += 1
        elif token[0] in CLOSE or token[0] in ("\\end", "\\}"):
            depth -= 1
        elif depth == 0 and is_mark(token):
            parts.append(text[start : token.start()].strip())
            start = token.end()
    parts.append(text[start:].strip())
    return [part for part in parts if part] or [""]


def _closes_last(text: str) -> bool:
    depth = 0
    for i, mark in enumerate(text):
        depth += (mark in OPEN) - (mark in CLOSE)
        if depth == 0:
            return i == len(text) - 1
    return False
