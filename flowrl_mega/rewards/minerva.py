"""The answer that DAPO's rule reads in a response, and its normal form.

The rule, its lists and their order are those of verl's math_dapo.py (Apache-2.0), which has the normal form from
Minerva (arXiv 2206.14858, appendix D.1) by way of lm-evaluation-harness. They look odd in places ("sue", a trailing "m"
only in \\text) and stay as they are: figures are comparable only where the rule is the same.
"""

from __future__ import annotations

import re

TAIL = 300  # characters in which the answer line must stand
BOX_TAIL = 100  # and the box, where there is no such line

ANSWER_LINE = re.compile(r"(?i)Answer\s*:\s*([^\n]+)")

INTEGER = re.compile(r"(-?)0*(0|[1-9][0-9]*)")

SUBSTITUTIONS = [
    ("an ", ""),
    ("a ", ""),
    (".$", "$"),
    ("\\$", ""),
    (r"\ ", ""),
    (" ", ""),
    ("mbox", "text"),
    (",\\text{and}", ","),
    ("\\text{and}", ","),
    ("\\text{m}", "\\text{}"),
]
REMOVED = """square ways integers dollars mph inches hours km units \\ldots sue points feet minutes digits cents degrees
cm gm pounds meters meals edges students childrentickets multiples \\text{s} \\text{.}""".split()
REMOVED += ["\\text{\ns}", "\\text{}^2", "\\text{}^3", "\\text{\n}", "\\text{}", r"\mathrm{th}", r"^\circ", r"^{\circ}"]
REMOVED += [r"\;", r",\!", "{,}", '"', "\\dots"]


def extract(response: str) -> tuple[str, bool] | None:
    """What the response answers, and whether that came from an answer line (so that it is compared in normal form).

    The last "Answer: ..." line of the last 300 characters; without one the last \\boxed{} of the last 100, which the
    rule compares literally; else None.
    """
    tail = response[-TAIL:]
    lines = ANSWER_LINE.findall(tail)
    if lines:
        return lines[-1], True
    box = _last_box(tail[-BOX_TAIL:])
    return None if box is None else (box, False)


def normalise(answer: str) -> str:
    """Minerva's normal form: units, spaces and text marks gone, fractions and roots braced, digits without commas."""
    if answer.isdigit():  # most answers: nothing below would change one
        return answer
    answer = answer.split("=")[-1]
    for before, after in SUBSTITUTIONS:
        answer = answer.replace(before, after)
    for text in REMOVED:
        answer = answer.replace(text, "")
    answer = re.sub(r"(.*?)(\$)(.*?)(\$)(.*)", "$\\3$", answer)
    answer = re.sub(r"(\\text\{)(.*?)(\})", "\\2", answer)
    answer = re.sub(r"(\\textbf\{)(.*?)(\})", "\\2", answer)
    answer = re.sub(r"(\\overline\{)(.*?)(\})", "\\2", answer)
    answer = re.sub(r"(\\boxed\{)(.*)(\})", "\\2", answer)
    answer = re.sub(r"(frac)([^{])(.)", "frac{\\2}{\\3}", answer)  # \fracab
    answer = re.sub(r"(sqrt)([^{])", "sqrt{\\2}", answer)  # \sqrta
    answer = answer.replace("$", "")
    if answer.replace(",", "").isdigit():
        answer = answer.replace(",", "")
    return answer.strip()


def same(given: str, right: str) -> bool:
    """Equal as strings, or as integers but for leading zeros: AIME's 033 is 33. The one difference from verl's rule."""
    if given == right or given[-1:] != right[-1:]:  # most answers: cheaper than to read two integers
        return given == right
    a, b = INTEGER.fullmatch(given), INTEGER.fullmatch(right)
    return a is not None and b is not None and a.groups() == b.groups()


def _last_box(text: str) -> str | None:
    """What stands in the last \\boxed{}; None if there is none or it is not closed. Every brace counts, as in verl."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    start += len("\\boxed{")
    depth = 1
    for i in range(start, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[start:i]
    return None
