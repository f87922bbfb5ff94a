"""Expressions whose value has more digits than can be computed are known by their form, before anything computes."""

from __future__ import annotations

import math
from typing import Any

import sympy

MOST_DIGITS = 50_000.0
MOST_TERMS = 7.0  # the logarithm of an exponent over a name
FACTORIALS = ("factorial", "gamma", "subfactorial", "binomial", "factorial2", "RisingFactorial", "FallingFactorial")


class TooLarge(Exception):
    """A part of an expression is a number with too many digits."""


def check_size(expression: Any) -> None:
    """Raise TooLarge if a part of it is a power or a factorial with more than 50,000 digits."""
    if isinstance(expression, sympy.Basic | sympy.MatrixBase):
        _digits(expression)


def _digits(expression: Any) -> float:
    """The logarithm of its absolute value to base 10, about; that of the parts is checked on the way."""
    if isinstance(expression, sympy.Integer | sympy.Rational):
        return _log(abs(expression.p)) - _log(expression.q)
    if isinstance(expression, sympy.Float):
        return float(sympy.log(abs(expression), 10)) if expression else 0.0
    is_matrix = isinstance(expression, sympy.MatrixBase)  # of which those that can be changed have no args
    parts = [_digits(part) for part in (expression.flat() if is_matrix else expression.args)]
    name = type(expression).__name__
    if name == "Pow":
        size = _power(expression.args[0], parts)
    elif name in FACTORIALS:
        size = _factorial(parts[0])
    elif name == "exp":
        size = _times(parts[0], 0.4343)
    elif name == "Mul":
        size = sum(parts)
    else:
        size = max(parts, default=0.0)
    if abs(size) > MOST_DIGITS:
        raise TooLarge(f"{size:.0f} digits")
    return size


def _power(base: Any, parts: list[float]) -> float:
    if not base.is_number:  # (x+1)^(1000!): its terms are as many
        return _times(parts[1], 1e-2) if parts[1] > MOST_TERMS else 0.0
    return _times(parts[1], parts[0] if parts[0] else (0.3 if base.is_Add else 0.0))


def _times(log: float, factor: float) -> float:
    return factor * 10 ** min(log, 12.0)


def _factorial(log: float) -> float:
    n = 10 ** min(log, 12.0)
    return n * math.log10(n / math.e) + math.log10(2 * math.pi * n) / 2 if n > 3 else 0.0


def _log(number: int) -> float:
    return math.log10(number) if number else 0.0
