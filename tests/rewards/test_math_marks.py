r"""What an answer's text is without the marks that do not change its value: each rule with a neighbour beside it."""

from __future__ import annotations

import time
import unicodedata
from fractions import Fraction

import pytest

from flowrl_mega.rewards.marks import balanced, has_loose_text, is_unit, latex, tidy, words

UNITS = """unit units cm mm km meter metre meters metres mile miles mph km/h ft feet foot inch inches yard yards kg gram
grams lb lbs pound pounds ounce ounces liter litre liters litres gallon gallons second seconds minute minutes min mins
hour hours hr hrs day days week weeks month months year years degree degrees dollar dollars cent cents euro euros point
points people student students ways""".split()
NO_UNITS = """percent percentage pct and or not is are was wrong but if when where than more less least
most about approximately plus minus over divided mod modulo base to through by dozen dozens half halves third thirds
gross hundred hundreds thousand thousands million millions billion billions trillion trillions zero one two three four
five six seven eight nine ten eleven twelve hence so either maybe otherwise except without factorial i e x y z n
pi""".split()
TEXTS = "text textrm textnormal textsf mbox mathrm mathsf mathit textbf textit operatorname".split()


@pytest.mark.parametrize(
    ("text", "tidied"),
    [
        # What surrounds it
        ("$42$", "42"),
        ("\\(42\\)", "42"),
        ("\\[42\\]", "42"),
        ("\\$42", "\\$42"),
        ("a \\\\[2] \\\\(3)", "a \\\\[2] \\\\(3)"),
        (" **42** \n", "42"),
        ("\t**42**\r", "42"),
        ("\n`42`", "42"),
        ("42 . ,", "42"),
        ("42,;", "42"),
        ("$42$.", "42"),
        (".5", ".5"),
        # Separators of thousands
        ("1\\,234", "1234"),
        ("1,\\!234\\!567", "1234567"),
        ("1{,}234", "1234"),
        ("1\\ 234 567", "1234567"),
        ("0.123 456", "0.123 456"),
        ("1234 567", "1234 567"),
        ("1 2345", "1 2345"),
        ("1, 234", "1, 234"),
        # Mixed numbers
        ("5 1/2", "5\\frac{1}{2}"),
        ("15  11 / 20", "15\\frac{11}{20}"),
        ("0.51 1/2", "0.51 1/2"),
        ("5 1/25.5", "5 1/25.5"),
        ("3/5 1/2", "3/5 1/2"),
        ("5 1/2.5", "5 1/2.5"),
        # Units as words
        ("5 Square Miles", "5"),
        ("5 cubic  feet", "5"),
        ("5 square  feet", "5"),
        ("5 sq.  ft", "5"),
        ("5 sq ft", "5"),
        ("5 cm^2", "5"),
        ("5 CM ^{3}", "5"),
        ("(5) cm", "(5)"),
        ("x^{2} cm", "x^{2}"),
        ("5 cm^4", "5 cm^4"),
        ("x cm", "x cm"),
        ("5 square", "5 square"),
        ("5 cm x", "5 cm x"),
        # Units in \text
        ("5\\text {cm}", "5"),
        ("5\\quad\\text{cm}", "5"),
        ("5\\text{ cm} ^ { -2 }", "5"),
        ("5\\text{ cm}^{2}", "5"),
        ("5\\text{ cm}^2", "5"),
        ("5\\text{ cm}^x", "5\\text{ cm}^x"),
        ("5\\%\\text{ of sales}", "5\\%"),
        ("(5)\\text{ cm}", "(5)"),
        ("x^{2}\\text{ cm}", "x^{2}"),
        ("5.\\text{ cm}", "5."),
        ("5\\dfrac{\\text{m}}{\\text{s}^2}", "5"),
        ("5\\tfrac { \\text{m} } { \\text{s} }", "5"),
        ("5\\frac{\\text{m}}{2}", "5\\frac{\\text{m}}{2}"),
        ("5\\text{ kg}\\text{ m}/\\text{s}\\cdot\\text{K}\\times\\text{A}", "5"),
        ("5\\text{ kg} \\per \\text{s}", "5"),
        ("5" + "\\text{a}" * 9, "5"),
        ("5\\text{ m} \\text{ or }\\text{s}", "5\\text{ m} \\text{ or }\\text{s}"),
        ("5\\frac{\\text{or}}{\\text{s}}", "5\\frac{\\text{or}}{\\text{s}}"),
        ("5\\text{ m}\\text{ }", "5"),
        ("x\\text{ cm}", "x\\text{ cm}"),
        # Numbers in words
        ("3 hundred", "3\\times 10^{2}"),
        ("3 Thousands", "3\\times 10^{3}"),
        ("3 million", "3\\times 10^{6}"),
        ("3billion dollars", "3\\times 10^{9}"),
        ("3 \\text{ trillion people}", "3\\times 10^{12}"),
        ("3 \\text {dozen eggs}", "3*12"),
        ("x million", "x million"),
        ("3 \\text{ million or 4}", "3 \\text{ million or 4}"),
        ("3 millionaires", "3 millionaires"),
        ("3 \\text{million }", "3\\times 10^{6}"),
        # Bold, colour
        *((f"\\{mark}{{42}}", "42") for mark in "boldsymbol bm pmb underline mathbf mathbb bf displaystyle".split()),
        ("\\mathbf {42}.", "42"),
        ("\\displaystyle 42", "42"),
        ("\\boldsymbol{\\underline{4}}2", "42"),
        ("\\textcolor{blue}{42}", "42"),
        ("\\textcolor{blue} {42}", "42"),
        ("\\color{red} 42", "42"),
        ("\\color 42", "42"),
        ("\\bf 4^{2}", "4^{2}"),
        ("\\mathbf{ \\text{Answer: }42}", "42"),
        ("\\color{red 42", ""),
        ("\\mathbf{42", "{42"),
        ("5 \\bmod 7", "5 \\bmod 7"),
        ("5 \\bmX 7", "5 \\bmX 7"),
        ("\\mathbf{R}", "\\mathbf{R}"),
        ("\\mathbb { Z}", "\\mathbb { Z}"),
        ("\\mathbb Q", "\\mathbb Q"),
        ("\\mathbf{AB}", "AB"),
        ("\\boldsymbol{R}", "R"),
        # Text
        ("\\text{42}", "42"),
        ("\\text{1}2\\text{3}", "123"),
        ("\\text{1{2}3}", "\\text{1{2}3}"),
        ("2\\mathrm{ i }", "2 i"),
        ("2\\mathrm{e}", "2e"),
        ("2\\text{i}", "2\\text{i}"),
        ("\\text{-3 cm}", "-3"),
        ("\\text{ 1,234.5/6 cm\n}", "1,234.5/6"),
        ("\\text{3cm}", "3"),
        ("\\text{3million}", "3\\times 10^{6}"),
        *((f"\\text{{{text}}}", f"\\text{{{text}}}") for text in ("3_cm", "3 +cm", "3 4cm")),
        ("2\\text{_}", "2_"),
        ("5\\text{3 cm}", "5\\text{3 cm}"),
        ("\\text{3 cm}5", "\\text{3 cm}5"),
        # What stands before and behind
        ("\\text{Answer: }42", "42"),
        ("\\text{ The  final  answer is: }42", "42"),
        ("\\text{ans} : 42", "42"),
        ("\\text{Result =}=42", "42"),
        ("\\text{solution}42", "42"),
        ("\\text{the answer is}42", "42"),
        ("\\text{answers}42", "\\text{answers}42"),
        *((f"{mark} 42", "42") for mark in ("=", "\\approx", "\\simeq", "\\doteq", "\\sim", "\\, = \\;")),
        ("= 42 .", "42"),
        ("\\approxeq 42", "\\approxeq 42"),
        ("\\simx 42", "\\simx 42"),
        ("42\\checkmark", "42"),
        ("42 \\blacksquare", "42"),
        ("\\checkmarks", "\\checkmarks"),
        ("\\checkmarkX", "\\checkmarkX"),
        # Constants and roots in plain text
        ("2pi/3", "2\\pi /3"),
        ("\\pi", "\\pi"),
        *((text, text) for text in ("api", "Api", "pix", "piX")),
        ("2sqrt(3)", "2\\sqrt{3}"),
        ("sqrt (12)", "\\sqrt{12}"),
        ("sqrt()", "\\sqrt{}"),
        ("sqrt(2)+3)", "\\sqrt{2}+3)"),
        *((text, text) for text in ("\\sqrt(2)", "asqrt(2)", "Asqrt(2)", "sqrt((2)", "sqrt(2")),
        # Degrees
        ("42 ^ { \\circ }", "42"),
        ("42\\,^\\circ C", "42"),
        ("42^{\\circ} F", "42"),
        ("42^\\circ \\text{ K }", "42"),
        ("42^\\circ\\text{F}", "42"),
        ("42^\\circ\\text{ C}", "42"),
        ("42\\degree", "42"),
        ("(42) ^ \\circ", "(42)"),
        ("x^{2}^\\circ", "x^{2}"),
        ("42^{\\circ} degrees", "42"),
        ("x^\\circ", "x^\\circ"),
        ("42^\\circ K", "42^\\circ K"),
        ("42^\\circ\\text{X}", "42^\\circ\\text{X}"),
    ],
)
def test_tidied(text, tidied):
    assert tidy(text) == tidied


@pytest.mark.parametrize("unit", UNITS)
def test_units_as_words(unit):
    assert tidy(f"5{unit}") == tidy(f"5 {unit}") == "5"
    assert is_unit(unit)


@pytest.mark.parametrize("word", NO_UNITS)
def test_words_that_are_no_units(word):
    assert not is_unit(word)
    assert word == "n" or not is_unit(f"big {word.upper()}")


@pytest.mark.parametrize("command", TEXTS)
@pytest.mark.parametrize("space", ["", *"\n ", *(f"\\{mark}" for mark in ",;:! ")])
def test_units_in_text(command, space):
    assert tidy(f"5{space}\\{command}{{cm}}") == "5"


@pytest.mark.parametrize(
    "text", "cm cm. cm, cm^2. cm2 cm^{-1} cm^-1 m/s /s m·K m*K m-K m.K N".split() + ["/ s", "m / s"]
)
def test_what_is_a_unit(text):
    assert is_unit(f" {text} ")
    assert is_unit("right triangles") and is_unit("kg m s A K") and not is_unit("kg m s A K mol")


@pytest.mark.parametrize("text", ["", "3m", "m_2", "m0", "and2", "m + K", "m = 2", "m(K)", "(m)", "m!", "//s", "m^22"])
def test_what_is_no_unit(text):
    assert not is_unit(text)


@pytest.mark.parametrize(
    "text",
    ["5\\text{ or}", "5\\%\\text{ or}", "(5)\\text{ or}", "x^{2}\\text{ or}", "5.\\text{ or}", "5 \\text{ab}^2"],
)
def test_loose_text(text):
    assert has_loose_text(text)


@pytest.mark.parametrize("text", ["5", "5\\text{i}", "5\\text{ i }", "5\\text{}", "x\\text{ or}", "5\\text{ or}x"])
def test_no_loose_text(text):
    assert not has_loose_text(text)


SYMBOLS = dict(
    zip(
        "× · ⋅ ÷ ∞ π ≤ ≥ ≠ ± ∪ ∩ ∈ ∅ ≈".split(),
        "times cdot cdot div infty pi le ge ne pm cup cap in emptyset approx".split(),
        strict=True,
    )
)


@pytest.mark.parametrize(
    ("text", "read"),
    [
        *((f"a{mark}b", f"a\\{command} b") for mark, command in SYMBOLS.items()),
        ("−1–2", "-1-2"),
        ("ℝ ℤ", "\\mathbb{R} \\mathbb{Z}"),
        ("9° 9º", "9^\\circ 9^\\circ"),
        ("1、2。", "1,2."),
        ("4\u200b2\ufeff\ufe0f✓✔", "42"),
        ("a\u00a0b\u202fc\u2009d", "a b c d"),
        ("（４，２）：！", "(4,2):!"),
        ("x⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻ⁿ", "x^{0123456789+-n}"),
        ("x²y³", "x^{2}y^{3}"),
        ("√2", "\\sqrt{2}"),
        ("√12", "\\sqrt{12}"),
        ("√(2)+3)", "\\sqrt{2}+3)"),
        ("√{2}+3}", "\\sqrt{2}+3}"),
        ("√ 12.75", "\\sqrt{12.75}"),
        ("√x", "\\sqrt{x}"),
        ("√(2+x)", "\\sqrt{2+x}"),
        ("√{2+x}y", "\\sqrt{2+x}y"),
        ("√() √{}", "\\sqrt{} \\sqrt{}"),
        ("√((2)", "√((2)"),
        ("√{{2}", "√{{2}"),
        ("5 ½", "5\\frac{1}{2}"),
        ("10⁄21", "\\frac{10}{21}"),
        ("a~b", "a b"),
        ("\\~n", "\\~n"),
    ],
)
def test_unicode_as_latex(text, read):
    assert latex(text) == read


@pytest.mark.parametrize("mark", "½¼¾⅓⅔⅕⅖⅗⅘⅙⅚⅛⅜⅝⅞")
def test_mixed_numbers_in_unicode(mark):
    part = Fraction(unicodedata.numeric(mark)).limit_denominator(10)
    assert latex(f"5{mark}") == f"5\\frac{{{part.numerator}}}{{{part.denominator}}}"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        *((f"\\{command} {{No}}", "no") for command in "text textbf textit textrm mbox mathrm mathbf".split()),
        *((f"{mark}no{mark}", "no") for mark in " ().,;!\"'*`"),
        ("\\text{no} \\text{Solution}", "no solution"),
        ("no\\ solution", "no solution"),
        ("left-right  (it's) a", "left-right (it's) a"),
        ("\\text{a}-\\text{b}", "a-b"),
        (" .no. ", "no"),
        ("Évelyn", "évelyn"),
        ("", None),
        ("x2", None),
        ("no 2", None),
        ("a_b", None),
        ("a b_c", None),
        ("a = b", None),
        ("\\text{a{b}c}", None),
        ("\\text{a", None),
        ("\\pi", None),
    ],
)
def test_words(text, said):
    assert words(text) == said


@pytest.mark.parametrize(
    ("text", "closed"),
    [("", True), ("{a}{b{c}}", True), ("\\{", True), ("\\\\{a}", True), ("{", False), ("}{", False), ("{}}", False)],
)
def test_balanced(text, closed):
    assert balanced(text) == closed


def test_a_long_row_of_units_is_read_soon():
    """Of 999 characters; where each space could stand in two places it took minutes."""
    start = time.process_time()
    tidy("5" + ("\\text{a}" + " " * 191) * 5 + "x")
    assert time.process_time() - start < 0.3
