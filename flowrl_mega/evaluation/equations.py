r"""The equations that a solution states, in a normal form: a rough fingerprint of how it got to its answer.

Looked for in LaTeX ($..$, $$..$$, \(..\), \[..\], align and the like) and in plain text ("12 + 30 = 42"), nowhere in
code fences. A rule of thumb, the same for every policy: it proves nothing of a single answer. Linear in the length.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

ENVIRONMENT = r"(?:align|aligned|alignat|equation|gather|gathered|eqnarray|multline|split)\*?"
MARK = re.compile(rf"\\begin\{{{ENVIRONMENT}\}}|\\end\{{{ENVIRONMENT}\}}|\\\\|\\[\[\]()$]|\$\$|\$|\n")
CLOSER = {r"\[": r"\]", r"\(": r"\)", "$$": "$$", "$": "$"}
INLINE, BEGINS = ("$", r"\)"), (r"\[", r"\(")  # what ends with its line; what can be nothing but a beginning
FENCE = re.compile(r"^[ \t]*```.*?(?:^[ \t]*```|\Z)", re.DOTALL | re.MULTILINE)


def equations(text: str) -> list[str]:
    """Every equation of the text in normal form, in order, with repetitions; a chain a = b = c is a = b and b = c."""
    found: list[str] = []
    for is_maths, piece in _pieces(FENCE.sub("\n", text)):
        found += _in_maths(piece) if is_maths else _in_plain_text(piece)
    return found


def _pieces(text: str) -> Iterator[tuple[bool, str]]:
    """The text in parts, and of each whether it is LaTeX. A mark that nothing closes is plain text: it may be money."""
    begun, closer, opened, inside = 0, "", 0, 0  # where plain text began, what would close, the opening mark, its end
    for mark in MARK.finditer(text):
        name = mark[0]
        if closer and name == closer and (name != "$" or _is_closed(text, inside, mark.start())):
            yield False, text[begun:opened]
            yield True, text[inside : mark.start()]
            begun, closer = mark.end(), ""
        elif name == "\n":
            closer = "" if closer in INLINE else closer
        elif name in BEGINS or (name in CLOSER or name.startswith(r"\begin")) and closer in ("", "$"):
            closer, opened, inside = CLOSER.get(name, name.replace("begin", "end", 1)), mark.start(), mark.end()
    yield False, text[begun:]


def _is_closed(text: str, start: int, end: int) -> bool:
    """Whether the $ at `end` closes one before `start`, and is no second sum of money as in "$5 * 3 = $15"."""
    inner = text[start:end]
    return inner[:1].isspace() == inner[-1:].isspace() and not text[end + 1 : end + 2].isdigit()


# What parts statements in LaTeX, beside commas and semicolons that no bracket encloses.
PARTS = re.compile(
    r"\\(?:implies|impliedby|iff|[lL]ongrightarrow|[rR]ightarrow|Longleftrightarrow|Leftrightarrow|therefore|because"
    r"|qquad|quad)(?![a-zA-Z])|\\(?:text|mbox|mathrm)\s*\{\s*(?:and|or|so|then|if|since|where|thus|hence)\s*\}"
)


def _in_maths(text: str) -> list[str]:
    """The equations of LaTeX, whose rows may go on with the last side of the row before."""
    found: list[str] = []
    last = ""
    for row in re.split(r"\\\\(?:\[[^\]\n]*\])?|\n\s*\n", text):
        for part in PARTS.split(row):
            for piece in _split(normal(part), ",;"):
                sides = _sides(piece)
                if len(sides) > 1 and not sides[0]:
                    sides[0] = last
                found += _pairs(sides)
                last = sides[-1]
    return found


# A name is a letter, or any word that stands alone on a side ("area = 12"); a command is what LaTeX has in plain text.
PLAIN = re.compile(
    r"(?P<number>(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?%?)"
    r"|(?P<word>[A-Za-zα-ωΑ-Ω]+)(?:_\{?[A-Za-z0-9]+\}?)?'*"
    r"|(?P<sign>\*\*|[-+*/^×·÷−–_]|\\(?:times|cdot|div|ast)(?![A-Za-z]))"
    r"|(?P<command>\\[A-Za-z]+)|(?P<open>[(\[{])|(?P<close>[)\]}])"
    r"|(?P<equal>(?<![=<>!:])=(?![=<>]))|(?P<space>[ \t]+|\\?\$|\n[ \t]*(?==(?!=)))|(?P<other>.|\n)"
)
BULLET = re.compile(r"^[ \t]*(?:[-*+•][ \t]+|\d+[.)][ \t]+|#+[ \t]*)", re.MULTILINE)
BOLD = re.compile(r"(?<![\w)])\*\*|\*\*(?![\w(])")
OPERAND = ("number", "word", "command", "open")


def _in_plain_text(text: str) -> list[str]:
    """The equations of plain text: the longest runs of numbers, names and signs that hold an equals sign.

    Two operands with only space between them are not of one run, so that "so x = 5" is x = 5; nor is a word of several
    letters with anything but an equals sign beside it.
    """
    found: list[str] = []
    run: list[tuple[str, str]] = []  # (kind, text)
    spaced = False
    for token in PLAIN.finditer(BOLD.sub(" ", BULLET.sub("", text))):
        kind = str(token.lastgroup)
        if kind == "space":
            spaced = True
            continue
        before = run[-1][0] if run else ""
        if kind == "word" and len(token["word"]) > 1:
            kind = "name"
        beside = kind in OPERAND and spaced and before in ("number", "word", "close")
        alone = kind == "name" and before not in ("", "equal") or before == "name" and kind != "equal"
        if beside or alone or kind == "other":
            found += _of_run(run)
            run = []
        if kind != "other":
            run.append((kind, token[0]))
        spaced = False
    return found + _of_run(run)


def _of_run(run: list[tuple[str, str]]) -> list[str]:
    if all(kind != "equal" for kind, _ in run):
        return []
    while run and run[-1][0] in ("sign", "open", "equal"):
        run.pop()
    text = normal("".join(text for _, text in run)).lstrip("+*/^_")
    return _pairs(_sides(_without_loose_brackets(text)))


REMOVED = re.compile(
    r"\\(?:left|right|[bB]igg?[lrm]?|displaystyle|textstyle|limits|nolimits|thinspace|qquad|quad)(?![a-zA-Z])"
    r"|\\(?:begin|end)\{[a-zA-Z]+\*?\}|\\[,;:! ]|[~&$\s]|\{,\}"
)
WRAPPER = re.compile(
    r"\\(?:boxed|fbox|text|textbf|textit|mathrm|mathbf|mathit|mbox|operatorname\*?|boldsymbol|bm)\{([^{}]*)\}"
)
FRACTION = re.compile(r"\\frac\{([^{}]*)\}\{([^{}]*)\}")
SIGNS = [
    (re.compile(before), after)
    for before, after in [
        (r"\\(?:cdot|times|ast)(?![a-zA-Z])|[×·∗⋅]", "*"),
        (r"\\div(?![a-zA-Z])|÷", "/"),
        (r"[−–]", "-"),
        (r"\*\*", "^"),
        (r"\\[dtc]frac(?![a-zA-Z])", r"\\frac"),
        (r"\\not=", r"\\ne "),
        (r":=", "="),
        (r"\\([%#_])", r"\1"),
        (r"\\\$", ""),
        (r"(?<=\d),(?=\d{3}(?!\d))", ""),
    ]
]
BARE = re.compile(r"\\frac([0-9])([0-9])")
SINGLE = re.compile(r"([\^_])\{(\w)\}")
RELATION = re.compile(r"[<>!=]=")
DEEPEST = 20  # levels of braces that are undone


def normal(text: str) -> str:
    r"""One spelling for what looks alike: no space, \left or wrapper; * for every times sign, (a)/(b) for fractions."""
    for before, after in SIGNS:
        text = before.sub(after, text)
    text = BARE.sub(r"\\frac{\1}{\2}", REMOVED.sub("", text))
    for _ in range(DEEPEST):
        simpler = SINGLE.sub(r"\1\2", FRACTION.sub(_slashed, WRAPPER.sub(r"\1", text)))
        if simpler == text:
            break
        text = simpler
    return text.rstrip(".,;:")


def _slashed(fraction: re.Match[str]) -> str:
    """a/b, and (a+1)/b where a side is more than one number or name."""
    over, under = (side if re.fullmatch(r"\\?\w+", side) else f"({side})" for side in fraction.groups())
    return f"{over}/{under}"


def _without_loose_brackets(text: str) -> str:
    """Without the brackets at its ends that have no partner in it."""
    spare = Counter[str]()
    for opening, closing in ("()", "[]", "{}"):
        spare[closing] = text.count(closing) - text.count(opening)
        spare[opening] = -spare[closing]
    start, end = 0, len(text)
    while start < end and spare[text[end - 1]] > 0:
        end -= 1
        spare[text[end]] -= 1
    while start < end and spare[text[start]] > 0:
        spare[text[start]] -= 1
        start += 1
    return text[start:end]


def _sides(text: str) -> list[str]:
    """The sides of a statement in normal form, where no bracket encloses the equals sign; brackets around it all go."""
    sides = _split(text, "=")
    for _ in range(DEEPEST):
        if len(sides) > 1 or "=" not in text or not _is_enclosed(text):
            break
        text = text[1:-1]
        sides = _split(text, "=")
    return sides


def _is_enclosed(text: str) -> bool:
    """Whether the first mark opens a bracket that the last one closes."""
    depth = 0
    for at, mark in enumerate(text):
        depth += (mark in "([{") - (mark in ")]}")
        if depth <= 0:
            return at == len(text) - 1 > 1
    return False


def _pairs(sides: list[str]) -> list[str]:
    return [f"{left}={right}" for left, right in zip(sides, sides[1:], strict=False) if left and right]


def _split(text: str, marks: str) -> list[str]:
    """The parts between `marks` that no bracket encloses; an = of <=, >=, != or == is none."""
    depth, start, parts = 0, 0, []
    for at, mark in enumerate(text):
        depth += (mark in "([{") - (mark in ")]}" and depth > 0)
        if depth == 0 and mark in marks and not (mark == "=" and RELATION.search(text, max(at - 1, 0), at + 2)):
            parts.append(text[start:at])
            start = at + 1
    return [*parts, text[start:]]
