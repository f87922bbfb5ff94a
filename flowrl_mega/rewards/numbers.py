"""Numbers as answers give them, read exactly: 4.5e33, 1.5 \\times 10^{3}, 33\\frac{1}{3}, 1/29322216, .5."""

from __future__ import annotations

import re
from dataclasses import dataclass
from fractions import Fraction

PLACES = 6  # of a decimal that stands for a number with no end

DECIMAL = r"(?:\d+(?:\.\d*)?|\.\d+)"
POWER_OF_TEN = r"10\s*(?:\^|\*\*)\s*(?:\{\s*([+-]?\s*\d{1,4})\s*\}|([+-]?\d{1,4}))"
SCIENTIFIC = re.compile(rf"({DECIMAL})\s*(?:\\times|\\cdot|\*|x|\s)\s*{POWER_OF_TEN}|{POWER_OF_TEN}")
PROGRAMS = re.compile(rf"({DECIMAL})[eE]([+-]?\d{{1,4}})")
FRACTION = re.compile(
    rf"(\d+)?\s*\\[dtc]?frac\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d))\s*(?:\{{\s*(-?{DECIMAL})\s*\}}|(\d))"
)
QUOTIENT = re.compile(rf"({DECIMAL})\s*/\s*({DECIMAL})")
GROUPED = re.compile(r"\d{1,3}(?:,\d{3})+(?:\.\d+)?")
PERCENT = re.compile(
    r"(?:\\?%|\s(?:percent|percentage|pct)|\\(?:text|mathrm|mbox)\s*\{\s*(?:percent|%|pct)\s*\})\s*$", re.I
)
MARKS = re.compile(r"\\left|\\right|\\[,;:! ]|\\\$|^\+")
ENCLOSED = re.compile(r"\((.*)\)|\{(.*)\}", re.DOTALL)


@dataclass(frozen=True)
class Number:
    """Its exact value, and how many places after the point it was written with (0 for what is no decimal)."""

    value: Fraction
    places: int = 0


def read(text: str) -> Number | None:
    """The number that the whole text is; None for anything else. Percent signs are not read: see `percent`."""
    text = MARKS.sub("", text.strip()).strip()
    if found := ENCLOSED.fullmatch(text):
        text = (found[1] or found[2] or "").strip()
    sign = -1 if text.startswith("-") else 1
    text = text[text.startswith("-") :].strip()
    number = _unsigned(text)
    return None if number is None else Number(sign * number.value, number.places)


def percent(text: str) -> str | None:
    """What stands before a final percent sign, None without one."""
    found = PERCENT.search(text)
    return text[: found.start()].strip() if found else None


def same(a: Number, b: Number) -> bool:
    """Exactly equal; or one has no end, as 1/3, and the other is its decimal to at least six places."""
    if a.value == b.value:
        return True
    for decimal, other in ((a, b), (b, a)):
        if decimal.places >= PLACES and not _ends(other.value):
            return close(decimal, other.value)
    return False


def close(decimal: Number, value: Fraction) -> bool:
    """Whether the decimal is the value, cut or rounded in its last place, with six digits beside leading zeros."""
    last, sign = Fraction(1, 10**decimal.places), 1 if value > 0 else -1
    return abs(decimal.value) >= last * 10 ** (PLACES - 1) and -last / 2 < sign * (value - decimal.value) < last


def _ends(value: Fraction) -> bool:
    rest = value.denominator
    for prime in (2, 5):
        while rest % prime == 0:
            rest //= prime
    return rest == 1


def _unsigned(text: str) -> Number | None:
    if GROUPED.fullmatch(text):
        text = text.replace(",", "")
    if re.fullmatch(DECIMAL, text):
        return _decimal(text)
    if found := PROGRAMS.fullmatch(text):
        return _scaled(found[1], found[2])
    if found := SCIENTIFIC.fullmatch(text):
        return _scaled(found[1] or "1", next(power for power in found.groups()[1:] if power))
    if found := FRACTION.fullmatch(text):
        whole, top, bottom = found[1], found[2] or found[3], found[4] or found[5]
        if Fraction(bottom) == 0 or (whole and not (top.isdigit() and bottom.isdigit())):
            return None
        return Number(int(whole or 0) + Fraction(top) / Fraction(bottom))
    if found := QUOTIENT.fullmatch(text):
        return Number(Fraction(found[1]) / Fraction(found[2])) if Fraction(found[2]) else None
    return None


def _decimal(text: str) -> Number:
    return Number(Fraction(text), len(text.partition(".")[2]))


def _scaled(mantissa: str, power: str) -> Number:
    number, shift = _decimal(mantissa), int("".join(power.split()))
    return Number(number.value * Fraction(10) ** shift, max(0, number.places - shift))
