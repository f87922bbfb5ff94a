r"""Numbers as they are read, without what sympy would find equal behind them: each rule with a neighbour beside it."""

from __future__ import annotations

from fractions import Fraction

import pytest

from flowrl_mega.rewards.equality import numbers_as_powers
from flowrl_mega.rewards.numbers import percent, read, same


@pytest.mark.parametrize(
    ("text", "value", "places"),
    [
        ("12", 12, 0),
        ("3.", 3, 0),
        ("3.50", "7/2", 2),
        (".25", "1/4", 2),
        (" +5", 5, 0),
        ("\\, 5", 5, 0),
        ("( -5 )", -5, 0),
        ("(\n5\n)", 5, 0),
        ("(\\frac{1}{2})", "1/2", 0),
        ("- 5", -5, 0),
        ("(-5)", -5, 0),
        ("{ 5 }", 5, 0),
        (" \\left( 5 \\right) ", 5, 0),
        ("-\\, 5", -5, 0),
        ("\\$ 27.00", 27, 2),
        ("1\\,2\\;3\\:4\\!5\\ 6", 123456, 0),
        ("1,234", 1234, 0),
        ("12,345,678.25", "12345678.25", 2),
        ("123,456", 123456, 0),
        # Powers of ten
        ("1.5e3", 1500, 0),
        ("25E+2", 2500, 0),
        ("2.5e-12", "2.5e-12", 13),
        ("3.33333e-1", "0.333333", 6),
        ("1.5 \\times 10^{3}", 1500, 0),
        ("1.5\\cdot10 ^ {+3}", 1500, 0),
        ("1.5*10^ { - 3 }", "0.0015", 4),
        ("1.5x10**12", "1.5e12", 0),
        ("1.5 10^-12", "1.5e-12", 13),
        ("2 * 10 ** +2", 200, 0),
        ("10^{-12}", "1e-12", 12),
        ("10^{-\n3}", "0.001", 3),
        # Fractions
        ("\\frac{1}{2}", "1/2", 0),
        ("\\dfrac12", "1/2", 0),
        ("\\tfrac 1 2", "1/2", 0),
        ("\\cfrac { -1.5 } { -.5 }", 3, 0),
        ("\\frac1{20}", "1/20", 0),
        ("\\frac{10}2", 5, 0),
        ("12 \\frac{1}{2}", "25/2", 0),
        ("-5\\frac12", "-11/2", 0),
        ("3 / 4.5", "2/3", 0),
        ("-1/3", "-1/3", 0),
    ],
)
def test_numbers(text, value, places):
    number = read(text)
    assert (number.value, number.places) == (Fraction(value), places)


@pytest.mark.parametrize(
    "text",
    ["", "x", "5x", "1,23", "1234,567", "1,234,56", "--5", "++5", "(5", "5)", "(5}", "(5)(6)", "((5)", "()", "1.2.3"]
    + ["5e", "e5", "5e1.5", "1e12345", "1.5\\timesx10^3", "10^{3", "10^3}", "10^{x}", "10^12345", "11^2", "2 10"]
    + ["\\frac{1}{0}", "1/0", "1/0.0", "\\frac{1}{x}", "\\frac{1}", "\\frac123", "\\sfrac12", "1\\frac{-1}{2}"]
    + ["1\\frac{1}{-2}", "1\\frac{1.5}{2}", "1\\frac{1}{2.5}", "1/2/3", "5\\%", "50 percent", "1 000"],
)
def test_no_numbers(text):
    assert read(text) is None


@pytest.mark.parametrize("sign", ["\\%", "%", " \\% ", " percent", " Percentage", "\tpct"])
@pytest.mark.parametrize("word", ["5", "\\frac{1}{2}", "x"])
def test_percent_signs(sign, word):
    assert percent(f" {word}{sign}") == word


@pytest.mark.parametrize("command", ["text", "mathrm", "mbox"])
@pytest.mark.parametrize("word", ["percent", "%", " pct ", "Percent"])
def test_percent_in_text(command, word):
    assert percent(f"5 \\{command} {{{word}}} ") == "5"


@pytest.mark.parametrize(
    "text", ["5", "5percent", "5\\text{ per cent}", "5% of 7", "5\\text{percents}", "5 \\textbf{%}"]
)
def test_no_percent_signs(text):
    assert percent(text) is None


@pytest.mark.parametrize(
    ("endless", "decimal", "equal"),
    [
        ("1/3", "0.333333", True),
        ("1/3", "0.33333", False),
        ("1/3", "0.333334", False),  # neither cut nor rounded
        ("1/3", "0.333332", False),
        ("2/3", "0.666666", True),
        ("2/3", "0.666667", True),
        ("2/3", "0.666668", False),
        ("2/3", "0.666665", False),
        ("-2/3", "-0.666666", True),
        ("-2/3", "-0.666667", True),
        ("-2/3", "-0.666668", False),
        ("-2/3", "0.666667", False),
        ("100/3", "33.333333", True),
        ("100/3", "33.3333", False),  # six digits, four places
        ("1/30000", "0.000033", False),  # six places, two digits
        ("1/30000", "0.000033333", False),  # five
        ("1/30000", "0.0000333333", True),
        ("100000/999999", "0.100000", True),
        ("1/1048576", "0.000000953674", False),  # ends: 0.00000095367431640625
        ("1/95367431640625", "0.0000000000000104857", False),
        ("1/20", "0.0500001", False),
        ("1/20", "0.0500000", True),
        ("1/6", "1/6", True),
        ("1/6", "1/7", False),
    ],
)
def test_decimals_of_what_has_no_end(endless, decimal, equal):
    """Both ways; what has an end must be written to it."""
    a, b = read(endless), read(decimal)
    assert same(a, b) is same(b, a) is equal


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("(1.5e3, 2)", "((1.5\\times 10^{3}), 2)"),
        (".25E-12+1.e+2", "(.25\\times 10^{-12})+(1.\\times 10^{+2})"),
        ("12e34", "(12\\times 10^{34})"),
        *((text, text) for text in ("x1e3", "\\1e3", "}1e3", "1e3x", "1e3.5", "1e", "e3", "1e3_2", "1 e3")),
    ],
)
def test_exponents_inside_of_formulas(text, read):
    assert numbers_as_powers(text) == read
