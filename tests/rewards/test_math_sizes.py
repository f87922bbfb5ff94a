"""Which expressions are too large to compute, by their form: each bound with a neighbour beside it."""

from __future__ import annotations

import pytest
import sympy

from flowrl_mega.rewards.sizes import TooLarge, check_size

x = sympy.Symbol("x")


def power(base, exponent):
    return sympy.Pow(base, exponent, evaluate=False)


def times(*factors):
    return sympy.Mul(*factors, evaluate=False)


def call(name, *arguments):
    return getattr(sympy, name)(*arguments, evaluate=False)


@pytest.mark.parametrize(
    ("fits", "too_large"),
    [
        (power(10, 49_999), power(10, 50_001)),
        (power(sympy.Rational(1, 10), 49_999), power(sympy.Rational(1, 10), 50_001)),
        (power(sympy.Float("100.0"), 24_999), power(sympy.Float("100.0"), 25_001)),
        (power(sympy.Float("-100.0"), 24_999), power(sympy.Float("-100.0"), 25_001)),
        (power(sympy.Rational(1000, 10), 24_999), power(sympy.Rational(1000, 10), 25_001)),
        (power(10, -49_999), power(10, -50_001)),
        (power(1, power(10, 40_000)), power(2, power(10, 40_000))),
        (power(1 + sympy.sqrt(2), 300_000), power(1 + sympy.sqrt(2), 400_000)),
        (power(call("Add", 1, 1), 160_000), power(call("Add", 1, 1), 170_000)),
        (power(0, 60_000), power(2, 200_000)),
        (power(sympy.pi, 100_000), power(power(10, 3), power(10, 5))),
        (power(x + 1, 10_000_000), power(x + 1, 100_000_000)),
        (times(power(10, 30_000), power(10, 19_000)), times(power(10, 30_000), power(10, 21_000))),
        (times(power(10, 30_000), x, 0), times(power(10, 50_000), x, 1000)),
        (call("Add", power(10, 30_000), power(10, 30_000)), call("Add", x, power(10, 60_000))),
        (call("factorial", 13_500), call("factorial", 13_600)),
        (call("factorial", call("factorial", 7)), call("factorial", call("factorial", 8))),
        (call("factorial", 3), call("factorial", power(10, 13))),
        (call("factorial", sympy.Rational(1, 10**400)), call("factorial", power(10, 400))),
        (call("factorial2", 13_500), call("factorial2", 13_600)),
        (call("subfactorial", 13_500), call("subfactorial", 13_600)),
        (call("gamma", 13_500), call("gamma", 13_600)),
        (call("binomial", 13_500, 7), call("binomial", 13_600, 7)),
        (sympy.RisingFactorial(sympy.Integer(13_500), x), sympy.RisingFactorial(sympy.Integer(13_600), x)),
        (sympy.FallingFactorial(sympy.Integer(13_500), x), sympy.FallingFactorial(sympy.Integer(13_600), x)),
        (call("exp", 100_000), call("exp", 120_000)),
        (sympy.Tuple(x, 1), sympy.Tuple(x, power(10, 60_000))),
        (sympy.Matrix([[1, x]]), sympy.Matrix([[1, power(10, 60_000)]])),
        (power(sympy.Float(0), 60_000), power(10, power(10, power(10, 10)))),
    ],
)
def test_sizes(fits, too_large):
    check_size(fits)
    with pytest.raises(TooLarge, match="digits"):
        check_size(too_large)


@pytest.mark.parametrize("value", ["text", None, [1], sympy.S.true, sympy.oo, sympy.nan, sympy.zoo])
def test_what_has_no_size(value):
    check_size(value)
