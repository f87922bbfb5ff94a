"""When two math answers are the same: numbers exactly, equations and assignments by their parts, the rest in sympy."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import math_verify
import sympy
from latex2sympy2_extended import NormalizationConfig
from math_verify.errors import TimeoutException

from flowrl_mega.rewards import equations, numbers
from flowrl_mega.rewards.limits import cpu_limit
from flowrl_mega.rewards.marks import balanced, has_loose_text, tidy, words
from flowrl_mega.rewards.sizes import TooLarge, check_size

LONGEST = 1000  # characters of an answer; the time of math-verify's parser grows with them
OUT_OF_ROOM = (TimeoutException, RecursionError, MemoryError, TooLarge)

# Units are removed by `tidy`, and only what stands in a box is read: see `final_answer`.
LATEX = math_verify.LatexExtractionConfig(
    boxed_match_priority=0,
    normalization_config=NormalizationConfig(basic_latex=True, units=False, malformed_operators=True, nits=True),
)
# Its warning that it has no limit of its own: `cpu_limit` is outside of it.
math_verify.parser.TIMEOUT_WARNING_SHOWN = math_verify.grader.TIMEOUT_WARNING_SHOWN = True

# Two letters are a product of variables, but for these and for Roman numerals.
TWO_LETTERS = re.compile(
    r"[IVX]{2}|(?i:no|on|up|in|of|to|is|it|if|or|go|do|so|we|he|me|my|by|ok|am|us|al|ed)|[A-Z][aeiouy]"
)

DIGITS = 50  # to which constants are computed
AGREE = sympy.Float(10) ** -40  # as a part of the larger one, for them to be equal
POINTS = [sympy.Rational(p, q) for p, q in ((137, 100), (211, 90), (83, 71), (307, 110), (59, 31), (401, 170))]


@dataclass(frozen=True)
class Gold:
    """A gold answer: its text; its words if it is in words."""

    text: str
    words: str | None


@lru_cache(maxsize=1 << 16)
def read_gold(answer: str, seconds: int) -> tuple[Gold, ...]:
    """What a response may give: one, or of a JSON list of strings each. ValueError: says why none can be compared."""
    if not answer.strip():
        raise ValueError("is empty")
    if len(answer) > LONGEST:
        raise ValueError(f"is longer than {LONGEST} characters")
    return tuple(_read_one(one, seconds) for one in _alternatives(answer))


def equal(gold: Gold, given: str) -> bool:
    """Whether a given answer is a gold one. May take any time, and more stack or memory than there is: OUT_OF_ROOM."""
    if len(given) > LONGEST:
        return False
    text = tidy(given)
    if text == gold.text:  # most right answers are: parsing takes milliseconds
        return True
    if gold.words is not None:
        return gold.words in (words(given), words(text))
    return _equal(gold.text, text)


def _alternatives(answer: str) -> list[str]:
    if answer.strip().startswith("["):
        try:
            given = json.loads(answer)
        except ValueError:
            return [answer]
        if given and all(isinstance(one, str) and one.strip() for one in given):
            return given
        if len(given) == 1 and type(given[0]) in (int, float):
            return [answer.strip()[1:-1]]
    return [answer]


def _read_one(answer: str, seconds: int) -> Gold:
    text = tidy(answer)
    in_text = "\\text" in answer or "\\mbox" in answer
    plain = words(answer) or (words(text) if in_text else None)  # $\text{no}$, but $abc$ is a product
    if plain is not None and (in_text or max(map(len, plain.split())) > 2):
        return Gold(text, plain)
    if TWO_LETTERS.fullmatch(text):
        return Gold(text, words(text))
    if numbers.read(text) is None:
        try:
            with cpu_limit(seconds):
                parsed = _parse(text)
        except OUT_OF_ROOM:
            raise ValueError(f"math-verify does not parse it within {seconds} s") from None
        if not parsed:
            raise ValueError("math-verify cannot parse it" + ("" if balanced(answer) else ", its braces do not match"))
    return Gold(text, None)


def _equal(gold: str, given: str) -> bool:
    """Of two tidied texts, each in turn: percent signs, numbers, assignments, equations, and what remains."""
    gold, given = tidy(gold), tidy(given)
    if gold == given:
        return True
    of_gold, of_given = numbers.percent(gold), numbers.percent(given)
    if of_gold is not None or of_given is not None:
        return _equal_percent(gold, given, of_gold, of_given)
    if has_loose_text(gold) or has_loose_text(given):
        return re.sub(r"\s", "", gold) == re.sub(r"\s", "", given)
    a, b = numbers.read(gold), numbers.read(given)
    if a is not None and b is not None:
        return numbers.same(a, b)
    for rule in (_as_assignments, _as_equations, _as_tuples):
        verdict = rule(gold, given)
        if verdict is not None:
            return verdict
    return _in_sympy(gold, given)


def _equal_percent(gold: str, given: str, of_gold: str | None, of_given: str | None) -> bool:
    """50\\% is 50\\%, 50 and 1/2; it is not 5\\%."""
    if of_gold is not None and of_given is not None:
        return _equal(of_gold, of_given)
    bare, other = (of_gold, given) if of_gold is not None else (of_given, gold)
    assert bare is not None
    number = numbers.read(bare)
    if number is None:
        return _equal(bare, other) or _equal(f"\\frac{{{bare}}}{{100}}", other)
    against = numbers.read(other)
    if against is None:
        hundredth = number.value / 100
        return _equal(bare, other) or _equal(f"{hundredth.numerator}/{hundredth.denominator}", other)
    hundredth_of = numbers.Number(number.value / 100, number.places + 2)
    return numbers.same(number, against) or numbers.same(hundredth_of, against)


def _as_assignments(gold: str, given: str) -> bool | None:
    """By name where both have names; else in the order in which the gold answer, or the given one, has them."""
    one, two = equations.values_of_one_name(gold), equations.values_of_one_name(given)
    if one is not None or two is not None:
        return _equal(one or gold, two or given) if _names(gold, given) else False
    of_gold, of_given = equations.assignments(gold), equations.assignments(given)
    if of_gold is None and of_given is None:
        return None
    if of_gold is not None and of_given is not None:
        values = {item.name: item.value for item in of_given}
        return {item.name for item in of_gold} == set(values) and all(
            _equal(item.value, values[item.name]) for item in of_gold
        )
    if of_gold is not None:
        got = equations.elements(given) or equations.items(given)
        return _in_order([item.value for item in of_gold], got)
    assert of_given is not None
    ordered = equations.elements(gold)
    if ordered is not None:
        return _in_order(ordered, [item.value for item in of_given])
    return _equal(gold, ", ".join(item.value for item in of_given))


def _names(gold: str, given: str) -> bool:
    """Whether two lists of values do not have different names."""
    a, b = (equations.assignment(equations.items(text)[0]) for text in (gold, given))
    return a is None or b is None or a.name == b.name


def _as_equations(gold: str, given: str) -> bool | None:
    """`name = value` is its value; other equations are the same if one is the other times a constant."""
    of_gold, of_given = equations.sides(gold), equations.sides(given)
    if of_gold is None and of_given is None:
        return None
    named_gold, named_given = equations.assignment(gold), equations.assignment(given)
    if of_gold is None:
        assert of_given is not None
        if named_given is not None:
            return _equal(gold, named_given.value)
        return all(_equal(gold, side) for side in of_given)  # 2 + 3 = 5
    if of_given is None:
        if named_gold is not None:
            return _equal(named_gold.value, given)
        return _is_identity(of_gold) and _equal(of_gold[-1], given)
    if named_gold is not None and named_given is not None and named_gold.name == named_given.name:
        return _equal(named_gold.value, named_given.value)
    return len(of_gold) == len(of_given) and _proportional(of_gold, of_given)


def _is_identity(sides: list[str]) -> bool:
    return all(_in_sympy(sides[-1], side) for side in sides[:-1])


def _proportional(gold: list[str], given: list[str]) -> bool:
    for i in range(len(gold) - 1):
        a, b = _difference(gold[i : i + 2]), _difference(given[i : i + 2])
        if a is None or b is None:
            return all(_equal(x, y) for x, y in zip(gold, given, strict=True))
        if a == 0 or b == 0:  # holds always: any such equation is a multiple of any other
            return _same_sides(gold, given)
        if not a.free_symbols or not sympy.cancel(a / b).is_number:
            return False
    return True


def _difference(sides: list[str]) -> Any:
    """Left minus right without denominators, simplified: 0 for what holds always. None if it is no scalar."""
    left, right = (_expression(side) for side in sides)
    if not isinstance(left, sympy.Expr) or not isinstance(right, sympy.Expr):
        return None
    check_size(left)
    check_size(right)
    return sympy.fraction(sympy.together(sympy.simplify(sympy.nsimplify(left - right, rational=True))))[0]


def _same_sides(gold: list[str], given: list[str]) -> bool:
    """The same sides in any order, each as it is written but for the order of terms."""
    shapes = [sorted(repr(_shape(side)) for side in sides) for sides in (gold, given)]
    return shapes[0] == shapes[1]


def _shape(side: str) -> Any:
    expression = _expression(side)
    number = numbers.read(side)
    if expression is None or (number is None and getattr(expression, "is_Number", False)):
        return re.sub(r"\s|\\left|\\right|\\,", "", side)  # a determinant is computed by the parser
    return _tree(expression)


def _tree(expression: Any) -> Any:
    if not getattr(expression, "args", ()):
        return str(expression)
    parts = [_tree(part) for part in expression.args]
    commutes = expression.is_Add or expression.is_Mul
    return expression.func.__name__, sorted(parts, key=repr) if commutes else parts


def _as_tuples(gold: str, given: str) -> bool | None:
    """Of plain numbers, in their order. None for all else, which sympy compares."""
    a, b = equations.elements(gold), equations.elements(given)
    if a is None or b is None:
        return _as_lists(gold, given)
    if all(numbers.read(item) is not None for item in a + b):
        return _in_order(a, b)
    return None


def _as_lists(gold: str, given: str) -> bool | None:
    """Lists of plain numbers, in any order."""
    bare = (equations.SIZES.sub("", text).strip() for text in (gold, given))
    a, b = (equations.items(text.removeprefix("\\{").removesuffix("\\}")) for text in bare)
    left, right = [numbers.read(item) for item in a], [numbers.read(item) for item in b]
    if None in left or None in right:
        return None
    left.sort(key=lambda number: number.value), right.sort(key=lambda number: number.value)  # type: ignore[union-attr]
    return len(a) == len(b) and all(numbers.same(x, y) for x, y in zip(left, right, strict=True))  # type: ignore[arg-type]


def _in_order(gold: list[str], given: list[str]) -> bool:
    return len(gold) == len(given) and all(_equal(a, b) for a, b in zip(gold, given, strict=True))


def _in_sympy(gold: str, given: str) -> bool:
    # Strings, which are last, first: comparing them costs no algebra.
    return any(_same(a, b) for b in reversed(_parse(given)) for a in reversed(_parse(gold)))


@lru_cache(maxsize=1 << 12)
def _parse(text: str) -> tuple[Any, ...]:
    """What math-verify reads in one tidied answer: an expression and its string, the string alone, or nothing."""
    if not balanced(text):
        return ()
    text = numbers_as_powers(text)
    try:
        return tuple(math_verify.parse(f"\\boxed{{{text}}}", [LATEX], parsing_timeout=None, raise_on_error=True))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # not one of its documented ones: the text comes from a model, and anything may break in a parser
        return ()


def numbers_as_powers(text: str) -> str:
    """1.5e3 anywhere as 1.5 \\times 10^{3}: the parser would read 1.5 times Euler's number times 3."""
    return re.sub(r"(?<![\w\\}])(\d+(?:\.\d*)?|\.\d+)[eE]([+-]?\d+)(?![\w.])", r"(\1\\times 10^{\2})", text)


def _expression(text: str) -> Any:
    return next(iter(_parse(text)), None)


def _same(gold: Any, given: Any) -> bool:
    try:
        for read in (gold, given):
            check_size(read)
        if not _may_be_equal(gold, given):
            return False
        return math_verify.verify(gold, given, timeout_seconds=None, raise_on_error=True)
    except (RecursionError, MemoryError, TooLarge):
        raise
    except Exception:  # sympy could not compare them, 1/0 with something for example
        return False


def _may_be_equal(gold: Any, given: Any) -> bool:
    """False where computing shows a difference, which math-verify rounds to six places or to 15 digits."""
    if not (isinstance(gold, sympy.Expr) and isinstance(given, sympy.Expr)) or gold == given:
        return True
    try:
        names = sorted(gold.free_symbols | given.free_symbols, key=str)
        values = dict(zip(names, POINTS, strict=False))
        a, b = (sympy.N(read.subs(values), DIGITS) for read in (gold, given))
        larger = max(abs(a), abs(b))
        if larger < AGREE:
            return True  # zero, but for what rounding left
        rounded = gold.has(sympy.Float) or given.has(sympy.Float)
        return bool(abs(a - b) <= larger * (sympy.Float("1e-5") if rounded else AGREE))
    except (RecursionError, MemoryError):
        raise
    except Exception:  # no numbers: infinity, more names than points
        return True
