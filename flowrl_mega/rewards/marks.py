"""The text of an answer made ready for comparing: what does not change its value is removed, Unicode becomes LaTeX."""

from __future__ import annotations

import re
import unicodedata

GROUP = re.compile(r"\\.|[{}]")  # an escaped brace groups nothing

NUMBER_GROUPS = re.compile(r"(?<![\d.])\d{1,3}(?:(?:,?\\!|\{,\}|\\,|\\ | )\d{3})+(?!\d)")
MIXED = re.compile(r"(?<![\d./])(\d+)\s+(\d+)\s*/\s*(\d+)(?![\d.])")
UNIT = re.compile(
    r"""(?<=[\d})])\s*(?:square\s+|cubic\s+|sq\.?\s+)?(?:units?|[cmk]m|met(?:er|re)s?|miles?|mph|km/h|ft|feet|foot|
    inch(?:es)?|yards?|kg|grams?|lbs?|pounds?|ounces?|lit(?:er|re)s?|gallons?|seconds?|minutes?|mins?|hours?|hrs?|days?|
    weeks?|months?|years?|degrees?|dollars?|cents?|euros?|points?|people|students?|ways)(?:\s*\^\{?[23]\}?)?$""",
    re.VERBOSE | re.IGNORECASE,
)
WORDS = re.compile(r"[^\W\d_]+(?:[\s'()-]+[^\W\d_]+)*")

TEXT = r"\\(?:text|textrm|textnormal|textsf|mbox|mathrm|mathsf|mathit|textbf|textit|operatorname)\s*\{"
SPACE = r"(?:\s|\\[,;:! ]|\\quad)*"
POWER = r"(?:\s*\^\s*(?:\{\s*-?\d\s*\}|\d))?"
TEXT_UNIT = rf"{TEXT}([^{{}}]*)\}}{POWER}"
UNITS = re.compile(  # to the end: texts with powers, products of them, quotients
    rf"(?<=[\d}})%.]){SPACE}(?:\\[dt]?frac\s*\{{\s*{TEXT_UNIT}\s*\}}\s*\{{\s*{TEXT_UNIT}\s*\}}"
    rf"|{TEXT_UNIT}(?:{SPACE}(?:(?:/|\\cdot|\\times|\\per){SPACE})?{TEXT_UNIT})*)$"
)
IN_TEXT = re.compile(TEXT + r"([^{}]*)\}")
# What is written as a unit: up to five words, each with a power at most, nothing that counts or relates.
ONE_UNIT = r"[^\W\d_]+(?:\^?\{?-?[1-9]\}?)?"
UNIT_WORDS = re.compile(rf"/?\s*{ONE_UNIT}(?:[\s/·*.-]+{ONE_UNIT}){{0,4}}[.,]?")
NO_UNIT = """percent percentage pct and or not is are was wrong but if when where than more less least
most about approximately plus minus over divided mod modulo base to through by dozen dozens half halves third thirds
gross hundred hundreds thousand thousands million millions billion billions trillion trillions zero one two three four
five six seven eight nine ten eleven twelve hence so either maybe otherwise except without factorial i e x y z n
pi""".split()
COUNTS = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}
COUNTED = re.compile(  # 3 million, 3 \text{ million dollars}
    rf"(?<=\d){SPACE}(?:{TEXT})?\s*(hundred|thousand|million|billion|trillion|dozen)s?\b\s*([^{{}}]*)\}}?$", re.I
)

WRAPS = re.compile(r"\\(boldsymbol|bm|pmb|underline|mathbf|mathbb|bf|displaystyle|textcolor|color)(?![a-zA-Z])\s*")
SUPERSCRIPTS = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "0123456789+-n")
SUPERSCRIPT = re.compile("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ]+")
ROOT = re.compile(r"√\s*(?:\(([^()]*)\)|\{([^{}]*)\}|(\d+(?:\.\d+)?|\w))")
BARE_ROOT = re.compile(r"(?<![\\a-zA-Z])sqrt\s*\(([^()]*)\)")
LATEX_OF = (
    r"× \times · \cdot ⋅ \cdot ÷ \div ∞ \infty π \pi ≤ \le ≥ \ge ≠ \ne ± \pm ∪ \cup ∩ \cap ∈ \in ∅ \emptyset ≈ \approx"
)
SYMBOLS = {mark: f"{command} " for mark, command in zip(LATEX_OF.split()[::2], LATEX_OF.split()[1::2], strict=True)}
SYMBOLS |= {
    "−": "-",
    "–": "-",
    "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}",
    "°": r"^\circ",
    "º": r"^\circ",
    "、": ",",
    "。": ".",
}
SYMBOLS |= dict.fromkeys("\u200b\ufeff\ufe0f✓✔", "")
CIRCLE = r"(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ)|\\degree)"
DEGREES = re.compile(rf"(?<=[\d}})]){SPACE}{CIRCLE}\s*(?:{TEXT}\s*[CFK]\s*\}}|[CF])?$")
LEADING = re.compile(rf"^(?:{SPACE}(?:=|\\approx(?![a-z])|\\simeq|\\doteq|\\sim(?![a-z]))){SPACE}")
LABEL = re.compile(
    rf"^{TEXT}\s*(?:the\s+)?(?:final\s+)?(?:answer|ans|result|solution)\s*(?::|\bis\b:?|=)?\s*\}}\s*:?", re.I
)


def tidy(text: str) -> str:
    """`text` without what surrounds a formula, its unit and separators of thousands, with mixed numbers as sums.

    Math-verify's own removal of units takes single letters too, so that 2h and 2 would be equal: it is switched off.
    It reads "1 000" as 1 * 000 and "5 1/2" as (5 + 1)/2.
    """
    text = re.sub(r"(?<!\\)(?:\\[()\[\]]|\$)", "", latex(text)).strip(" \t\r\n*`")
    text = _unwrap(text)
    text = LABEL.sub("", re.sub(r"\\(?:checkmark|blacksquare)(?![a-zA-Z])", "", text))
    text = LEADING.sub("", text).rstrip(" .,;")
    text = re.sub(r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi ", BARE_ROOT.sub(r"\\sqrt{\1}", text))
    text = IN_TEXT.sub(_read_text, text).strip()
    text = NUMBER_GROUPS.sub(lambda match: re.sub(r"\D", "", match[0]), text)
    text = MIXED.sub(r"\1\\frac{\2}{\3}", text)
    return _without_unit(text)


def latex(text: str) -> str:
    """Unicode as LaTeX: √2, x², ½, ∞; full-width digits and marks as plain ones; "~" and other spaces as spaces."""
    if not text.isascii():
        text = re.sub("(\\d)(?=[½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞])", r"\1 ", text)
        text = SUPERSCRIPT.sub(lambda match: f"^{{{match[0].translate(SUPERSCRIPTS)}}}", text)
        text = ROOT.sub(lambda match: f"\\sqrt{{{match[match.lastindex or 0]}}}", text)
        text = "".join(SYMBOLS.get(mark, mark) for mark in text)
        text = re.sub("(\\d+)\u2044(\\d+)", r"\\frac{\1}{\2}", unicodedata.normalize("NFKC", text))
        text = re.sub(r"(\d) (\\frac)", r"\1\2", text)
    return re.sub(r"(?<!\\)~", " ", text)


def words(text: str) -> str | None:
    """A text answer in lower case without marks: "\\text{(C)}" is "c". None if it is not words alone."""
    plain = re.sub(r"\\(?:text|textbf|textit|textrm|mbox|mathrm|mathbf)\s*\{([^{}]*)\}", r"\1", text)
    plain = " ".join(plain.replace("\\ ", " ").strip(" ().,;!\"'*`").split())
    return plain.casefold() if WORDS.fullmatch(plain) else None


def balanced(text: str) -> bool:
    """Whether every group of `text` is closed, so that it can stand inside braces."""
    depth = 0
    for token in GROUP.finditer(text):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth < 0:
            return False
    return depth == 0


def group_end(text: str, start: int) -> int:
    """Where the group that opens at `start` closes; -1 if it does not."""
    depth = 0
    for token in GROUP.finditer(text, start):
        depth += (token[0] == "{") - (token[0] == "}")
        if depth == 0:
            return token.start()
    return -1


def is_unit(text: str) -> bool:
    """Whether words after a number only name what it counts: no number, relation or operator among them."""
    text = text.strip()
    plain = [word if word == "N" else word.casefold() for word in re.findall(r"[^\W\d]+", text)]  # N: newtons
    return UNIT_WORDS.fullmatch(text) is not None and not set(plain) & set(NO_UNIT)


def has_loose_text(text: str) -> bool:
    """Whether text that is no unit stands right after a number at the end: it may change the value in any way."""
    found = re.search(rf"(?<=[\d}})%.]){SPACE}{TEXT}([^{{}}]*)\}}{POWER}$", text)
    return found is not None and len(found[1].strip()) > 1  # one letter is a name: 2\mathrm{i}


def _unwrap(text: str) -> str:
    """Without bold, colour and underlining. A bold capital alone may be a set, and keeps its mark."""
    for _ in range(20):
        mark = next((m for m in WRAPS.finditer(text) if not _is_a_set(text, m)), None)
        if mark is None:
            break
        rest = mark.end()
        if mark[1] in ("textcolor", "color") and text[rest : rest + 1] == "{":
            rest = group_end(text, rest) + 1 or len(text)
            rest += len(text[rest:]) - len(text[rest:].lstrip())
        end = group_end(text, rest) if text[rest : rest + 1] == "{" else -1
        inner = text[rest + 1 : end] + text[end + 1 :] if end >= 0 else text[rest:]
        text = text[: mark.start()] + inner
    return text.strip()


def _is_a_set(text: str, mark: re.Match[str]) -> bool:
    return mark[1] in ("mathbf", "mathbb") and re.match(r"\{?\s*[A-Z]\b", text[mark.end() :]) is not None


def _read_text(match: re.Match[str]) -> str:
    """A text with no letters, or an upright i or e, is a formula; one that begins with a number is it with its text."""
    inner = match[1]
    if inner.strip() in ("i", "e") and "mathrm" in match[0]:
        return inner
    if not re.search(r"[^\W\d_]", inner):
        return inner
    number = re.fullmatch(r"\s*(-?[\d.,/]*\d)(\s*[^\W\d_].*)", inner, re.DOTALL)
    if number and match.start() == 0 and match.end() == len(match.string):
        return f"{number[1]}\\text{{{number[2]}}}"
    return match[0]


def _without_unit(text: str) -> str:
    counted = COUNTED.search(text)
    if counted and (not counted[2] or is_unit(counted[2])):
        head, word = text[: counted.start()], counted[1].lower()
        return f"{head}*12" if word == "dozen" else f"{head}\\times 10^{{{COUNTS[word]}}}"
    unit = UNITS.search(text)
    if unit and all(is_unit(part) for part in IN_TEXT.findall(unit[0])):
        text = text[: unit.start()]
    return DEGREES.sub("", UNIT.sub("", text))
