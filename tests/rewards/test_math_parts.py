r"""How answers are put together: lists, equations, names. Each rule with a neighbour beside it."""

from __future__ import annotations

import pytest

from flowrl_mega.rewards.equations import (
    Assignment,
    assignment,
    assignments,
    elements,
    is_name,
    items,
    sides,
    values_of_one_name,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", [""]),
        ("1", ["1"]),
        ("1 ,2", ["1", "2"]),
        ("1;2", ["1", "2"]),
        ("1,,2,", ["1", "2"]),
        (",", [""]),
        ("and", [""]),
        ("1 and 2 or 3", ["1", "2", "3"]),
        ("1 \\text { and } 2 \\mbox{or} 3 \\mathrm{and} 4", ["1", "2", "3", "4"]),
        ("1 \\land 2 \\lor 3", ["1", "2", "3"]),
        ("1\\text{\tor\n}2", ["1", "2"]),
        ("a band b Xor c", ["a band b Xor c"]),
        ("1 orx 2, 1 orX 2, 1 anD 2", ["1 orx 2", "1 orX 2", "1 anD 2"]),
        ("x\\or y", ["x\\or y"]),
        ("1 \\landx 2", ["1 \\landx 2"]),
        ("1\\,2", ["1\\,2"]),
        ("(1,2), 3", ["(1,2)", "3"]),
        ("[1,2), {3,4}, [5,6], 7", ["[1,2)", "{3,4}", "[5,6]", "7"]),
        ("\\{1,2\\}; 3", ["\\{1,2\\}", "3"]),
        ("\\begin{matrix}1,2\\end{matrix}, 3", ["\\begin{matrix}1,2\\end{matrix}", "3"]),
        ("(1 and 2)", ["(1 and 2)"]),
    ],
)
def test_items(text, found):
    assert items(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x = 2", ["x", "2"]),
        ("x=2+3=5", ["x", "2+3", "5"]),
        ("x &= 2", ["x", "2"]),
        ("x =& 2", ["x", "2"]),
        ("f(x=1) = 2", ["f(x=1)", "2"]),
        ("x", None),
        ("x=", None),
        ("=2", None),
        ("x=&", None),
        ("x=1, y=2", None),
        ("x=1 and y=2", None),
        ("x:=2", None),
        ("x==2", None),
        ("x\\not=2", None),
        ("\\{x : x=2\\}", None),
    ],
)
def test_sides(text, found):
    assert sides(text) == found


RELATIONS = r"< > \le \leq \ge \geq \ne \neq \in \equiv \sim \lt \gt \subset \mid \approx \leqslant \geqslant".split()


@pytest.mark.parametrize("relation", RELATIONS)
def test_another_relation_is_no_equation(relation):
    assert sides(f"x=1 {relation} 2") is None
    assert sides(f"x=1 {relation}xyz 2") == (None if relation in "<>" else ["x", f"1 {relation}xyz 2"])


@pytest.mark.parametrize(
    ("text", "name", "value"),
    [
        ("x=5", "x", "5"),
        ("5 = x", "x", "5"),
        ("x=2+3=5", "x", "5"),
        ("x = y", "x", "y"),
        ("x_{1} = 5", "x_1", "5"),
        ("5 = x_{1}", "x_1", "5"),
        ("\\text{Area } = 5", "Area", "5"),
        ("\\mathrm{A}=5", "A", "5"),
        ("f\\left(x\\right)=2x", "f(x)", "2x"),
    ],
)
def test_a_name_and_its_value(text, name, value):
    assert assignment(text) == Assignment(name, value)


@pytest.mark.parametrize("text", ["x", "2x=5", "2+3=5=x", "5=x=5", "x<5", "x=1, x=2", "5=2x"])
def test_no_name_with_a_value(text):
    assert assignment(text) is None


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x=3, y=4", {"x": "3", "y": "4"}),
        ("(x,y)=(3,4)", {"x": "3", "y": "4"}),
        ("(x_{1}, y) = (3, 4)", {"x_1": "3", "y": "4"}),
        ("(x,y)=(3,4)=(5,6)", None),
        ("(x,2)=(3,4)", None),
        ("(x,y)=(3,4,5)", None),
        ("(x,y)=5", None),
        ("5=(x,y)", None),
        ("(x)=(3)", None),
        ("x=3", None),
        ("x=3, 4", None),
        ("x=3, x=4", None),
        ("3, 4", None),
    ],
)
def test_several_names(text, found):
    got = assignments(text)
    assert (got and {item.name: item.value for item in got}) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("x=1 or x=2", "1, 2"),
        ("x = 1, 2, 3", "1, 2, 3"),
        ("x=1, y=2", None),
        ("1, x=2", None),
        ("x=1", None),
        ("1, 2", None),
        ("x=1, x=2, 3", None),
    ],
)
def test_values_of_one_name(text, found):
    assert values_of_one_name(text) == found


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("(1,2)", ["1", "2"]),
        ("(1)", ["1"]),
        ("\\left ( (1,2), 3 \\right )", ["(1,2)", "3"]),
        (" \\bigl(1,2\\bigr)", ["1", "2"]),
        ("\\Big(1,2\\Big)", ["1", "2"]),
        ("\\biggl(1,2\\biggr)", ["1", "2"]),
        ("()", None),
        ("[1,2]", None),
        ("(1,2", None),
        ("(1,2)+(3,4)", None),
        ("1,2", None),
    ],
)
def test_elements(text, found):
    assert elements(text) == found


GREEK = """alpha beta gamma delta epsilon varepsilon zeta eta theta vartheta iota kappa lambda mu nu xi pi rho sigma tau
phi varphi chi psi omega Gamma Delta Theta Lambda Xi Pi Sigma Phi Psi Omega ell hbar""".split()
ACCENTS = "vec hat bar tilde overline overrightarrow mathbf mathcal mathrm text mathbb operatorname".split()
NAMES = "x I e x' x_1 x_12 x_{12} x_{} x_\\alpha x_1'' AB ABCD f(x) f() f_1(x,y) f^{-1}(x)".split() + [" x ", "f (x)"]
NAMES += ["\\angle A", "\\angle  A", "\\angle ABC", "\\angle  ABC", "\\triangle ABC", "\\angleABC", "\\angleA"]
NAMES += ["\\vec {v}", "\\vec{v}_1'", "\\vec{f}(x)", "f\\left(x\\right)", "f\\bigl(x\\bigr)"]
NO_NAMES = "2 2x x+y xy ABCDE x^2 x_{a{b} x_{a}+x_{b} \\vec{a{b} \\vec{a}+\\vec{b} f((x) f(x)+g(y) f(x=1)".split()
NO_NAMES += ["", "\\sqrt{2}", "\\frac12", "\\triangle A", "f(x)(y)", "\\alphax", "x_{a}}", "f(x)+y)"]


@pytest.mark.parametrize("text", [*NAMES, *(f"\\{name}" for name in GREEK), *(f"\\{mark}{{ab}}" for mark in ACCENTS)])
def test_names(text):
    assert is_name(text)


@pytest.mark.parametrize("text", NO_NAMES)
def test_no_names(text):
    assert not is_name(text)
