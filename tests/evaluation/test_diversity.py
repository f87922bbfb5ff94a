r"""Diversity against hand-worked cases, sacrebleu itself and closed forms of the Vendi score."""

from __future__ import annotations

import math
import random
import sys
import time

import numpy as np
import pytest

from flowrl_mega.evaluation import diversity
from flowrl_mega.evaluation.diversity import (
    clusters,
    distinct,
    distinct_n,
    distinct_right,
    self_bleu,
    solution_key,
    vendi,
    vendi_of_texts,
)
from flowrl_mega.evaluation.equations import equations, normal
from flowrl_mega.settings import ConfigError


@pytest.mark.parametrize(
    "votes, right, expected",
    [
        (["7", "7", "8", None], [True, True, False, False], (2, 1)),
        (["7", "8", "9"], [True, False, True], (3, 2)),
        (["7", "7"], [False, True], (1, 1)),  # right in one attempt is right
        ([None, None], [False, True], (0, 0)),
        ([], [], (0, 0)),
    ],
)
def test_distinct_answers(votes, right, expected):
    assert (distinct(votes), distinct_right(votes, right)) == expected


@pytest.mark.parametrize(
    "text, expected",
    [
        ("Then $x = 5$.", ["x=5"]),
        (r"Then \(x = 5\) and \[ y = \frac{1}{2} \] or $$z=3$$", ["x=5", "y=1/2", "z=3"]),
        ("12 + 30 = 42", ["12+30=42"]),
        ("First, we add: 12 + 30 = 42. So x = 7, and y = 8!", ["12+30=42", "x=7", "y=8"]),
        ("The total area = 3 * 4 = 12 square feet", ["area=3*4", "3*4=12"]),
        ("a chain $a = b = c$", ["a=b", "b=c"]),
        ("\\begin{align*}\nx &= 1 + 2 \\\\\n&= 3, \\\\ y &= 4\n\\end{align*}", ["x=1+2", "1+2=3", "y=4"]),
        ("\\[\\begin{aligned} x &= 1 \\\\[2pt] &= 2 \\end{aligned}\\]", ["x=1", "1=2"]),
        ("$x = 1, y = 2; z = 3$", ["x=1", "y=2", "z=3"]),
        (r"$2x = 4 \implies x = 2 \text{ and } y = 3$", ["2x=4", "x=2", "y=3"]),
        ("It costs $5 * 3 = $15, and $x=2$ more", ["5*3=15", "x=2"]),
        ("between $5 and $6, x = 7", ["x=7"]),
        ("$5+$3=$8", ["5+3=8"]),
        ("It is $ x = \\frac{1}{2} $ there", ["x=1/2"]),
        (r"\$5 + \$3 = \$8", ["5+3=8"]),
        (r"$\$5 + \$3 = \$8$", ["5+3=8"]),
        ("x = 5 (since 5 - 5 = 0)", ["x=5", "5-5=0"]),
        ("(so x = 5)", ["x=5"]),
        ("x = 5 - the end", ["x=5"]),
        ("**x = 5**\n- 12 / 4 = 3\n2. 6 - 1 = 5\n### f(2) = 9", ["x=5", "12/4=3", "6-1=5", "f(2)=9"]),
        ("$5,000 + 1 = 5,001$ and 1,000 + 1 = 1,001", ["5000+1=5001", "1000+1=1001"]),
        (r"\boxed{x = 5}", ["x=5"]),
        (r"12 \times 3 = 36 and 6 \cdot 2 = 12", ["12*3=36", "6*2=12"]),
        (r"$\sum_{i=1}^{n} i = 15$", [r"\sum_{i=1}^ni=15"]),
        (r"$f(x=3)$ and $\sum_{i=1}^{3} i$", []),
        ("$(x = 3)$", ["x=3"]),
        ("$x \\le 3$, $x <= 3$, $y >= 2$, $z != 1$, a == b, $c == d$, $e \\neq f$, $g \\not= h$", []),
        ("x <= 3, y >= 2, z != 1 => w", []),
        ("$n := 3$", ["n=3"]),
        ("12 + 30\n  = 42", ["12+30=42"]),
        ("$x =$ and $= 3$ and =", []),
        ("```python\nx = 5\n```\ny = 6\n```\nz = 7", ["y=6"]),
        ("cut off: \\( x = 5\nand \\[ y = 6", ["x=5", "y=6"]),
        ("cut off: \\[ a line of words\n\\[ y = \\frac12 \\]", ["y=1/2"]),
        ("cut off $x\nthen y = 3 more$", ["y=3"]),
        (r"\[ x = \text{cost of $5$} + 1 \]", ["x=costof5+1"]),
        ("12 + **30** = **42**", ["12+30=42"]),
        ("apples * 3 = 12 = area of it", ["3=12", "12=area"]),
        ("$x) = 5$", ["x)=5"]),
        ("x = 5 y = 6 and a 12 + 30 = 42", ["x=5", "y=6", "12+30=42"]),
        ("no equation at all", []),
        ("", []),
    ],
)
def test_equations_are_found(text, expected):
    assert equations(text) == expected


@pytest.mark.parametrize(
    "spellings, expected",
    [
        ([r"2 \cdot 3", r"2 \times 3", "2*3", "2 × 3", "2·3", r"2\,\cdot\,3"], "2*3"),
        ([r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac 1 2", "1/2", r"1 \div 2", "1 ÷ 2"], "1/2"),
        ([r"\frac{a+1}{\sqrt{b}}", r"\dfrac{a + 1}{\sqrt {b}}"], r"\frac{a+1}{\sqrt{b}}"),
        ([r"\frac{a+1}{2}", "(a+1)/2"], "(a+1)/2"),
        ([r"\frac{\frac{1}{2}}{3}", r"\frac{1/2}{3}"], "(1/2)/3"),
        ([r"\left( x + 1 \right)^{2}", r"\bigl(x+1\bigr)^2", "(x + 1)**2", r"( x\;+\:1\, )^2"], "(x+1)^2"),
        ([r"\boxed{x}", r"\text{x}", r"\mathrm{x}.", r"\displaystyle x,", "$x$", "x;", "~x", r"\boxed{\text{x}}"], "x"),
        (["1,234,567", "1{,}234{,}567", "1234567"], "1234567"),
        (["x−1", "x–1", "x - 1"], "x-1"),
        (["50\\%", "50 %"], "50%"),
        (["x_{1}", "x_1"], "x_1"),
        (["5!", "5 !"], "5!"),  # a factorial
        (["x_{12}"], "x_{12}"),
    ],
)
def test_one_normal_form(spellings, expected):
    assert {normal(spelling) for spelling in spellings} == {expected}


def test_keys_of_solutions():
    one = "We have $3x = 12$, so $x = 4$. Check: $3 \\cdot 4 = 12$."
    other = "Check 3 * 4 = 12 first.\n\\[ 3x = 12 \\]\n x = 4, x = 4"
    third = "By trial, $x = 4$."
    assert solution_key(one) == solution_key(other, "4") == ("3*4=12", "3x=12", "x=4")
    assert clusters([one, other, third, one]) == 2
    assert clusters([]) == 0


@pytest.mark.parametrize(
    "answers, expected",
    [
        (["4", "$4$", r"\text{4}"], 1),
        (["4", "5", "4"], 2),
        (["4", None, None], 2),
        (None, 1),
    ],
)
def test_without_equations_the_final_answer_is_the_key(answers, expected):
    assert clusters(["by symmetry", "it is clear", "trivially so"], answers) == expected


@pytest.mark.parametrize(
    "text",
    [
        "\\[" * 10_000,
        "$" * 20_001,
        "$ a" * 8_000,
        "x = (" * 6_000,
        "x = 5" + ")" * 20_000,
        "x = 1 " * 6_000,
        "=" * 20_000,
        "```\n" * 5_001,
        "{" * 15_000 + "x=1" + "}" * 15_000,
        "$" + "(" * 15_000 + "x=1" + ")" * 15_000 + "$",
        "$" + "\\frac{" * 6_000 + "=$",
    ],
)
def test_long_nonsense_takes_no_time(text):
    """The length of an answer of 8192 tokens; where it counted squared, this would take minutes."""
    began = time.process_time()
    solution_key(text)
    assert time.process_time() - began < 5


@pytest.mark.parametrize(
    "texts, n, expected",
    [
        (["a b a b"], 1, 2 / 4),
        (["a b a b"], 2, 2 / 3),
        (["a b", "b a"], 2, 1.0),  # no pair across texts
        (["a b c", "a b d"], 2, 3 / 4),
        (["a b", ""], 3, 0.0),
        ([], 1, 0.0),
    ],
)
def test_distinct_n(texts, n, expected):
    assert distinct_n(texts, n) == pytest.approx(expected)


def random_texts(seed: int) -> list[str]:
    """Texts of few words, of many lengths, some empty or alike, with marks that sacrebleu's words part."""
    drawn = random.Random(seed)
    words = ["x", "is", "5.", "(a+b)", "so,", "the", "answer", "1,000"]
    texts = [" ".join(drawn.choices(words, k=drawn.choice([0, 1, 3, 4, 12, 40]))) for _ in range(drawn.randint(2, 8))]
    return [*texts, texts[0], f"{texts[-1]} word-", f"{texts[-1]} word-\n"]


@pytest.mark.parametrize("seed", range(12))
def test_self_bleu_is_sacrebleus(seed):
    sacrebleu = pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    texts = random_texts(seed)
    scores = [sacrebleu.sentence_bleu(text, texts[:at] + texts[at + 1 :]).score / 100 for at, text in enumerate(texts)]
    assert self_bleu(texts) == pytest.approx(np.mean(scores), rel=1e-12)


def test_self_bleu_of_equal_and_of_unlike_texts():
    pytest.importorskip("sacrebleu", reason="the extra eval is not installed")
    assert self_bleu(["one two three four five"] * 3) == pytest.approx(1.0)
    assert self_bleu(["one two three four", "five six seven eight"]) == 0.0
    assert math.isnan(self_bleu(["alone"])) and math.isnan(self_bleu([]))


def test_self_bleu_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sacrebleu.metrics", None)
    diversity._sentence_bleu.cache_clear()
    with pytest.raises(ConfigError, match=r"pip install flowrl-mega\[eval\]"):
        self_bleu(["one", "two"])
    monkeypatch.undo()
    diversity._sentence_bleu.cache_clear()


@pytest.mark.parametrize("n", [1, 2, 7])
def test_vendi_of_alike_and_of_unlike(n):
    assert vendi(np.ones((n, n))) == pytest.approx(1.0)
    assert vendi(np.eye(n)) == pytest.approx(float(n))


@pytest.mark.parametrize("a", [0.1, 0.5, 0.9])
def test_vendi_of_two_by_its_closed_form(a):
    """Eigenvalues of K / 2 are (1 + a) / 2 and (1 - a) / 2."""
    p, q = (1 + a) / 2, (1 - a) / 2
    assert vendi(np.array([[1, a], [a, 1]])) == pytest.approx(p**-p * q**-q)


def test_vendi_of_groups_counts_them_by_their_shares():
    """Blocks of alike ones: exp of the entropy of the blocks' shares."""
    sizes = [4, 2, 1, 1]
    k = np.zeros((8, 8))
    for end, size in zip(np.cumsum(sizes), sizes, strict=True):
        k[end - size : end, end - size : end] = 1
    assert vendi(k) == pytest.approx(math.prod((size / 8) ** (-size / 8) for size in sizes))


@pytest.mark.parametrize(
    "k, said",
    [
        (np.ones((2, 3)), "square"),
        (np.ones(3), "square"),
        (np.ones((0, 0)), "square"),
        (np.eye(2) * 2, "with itself 1"),
        (np.array([[1, 0.5], [0.2, 1]]), "symmetric"),
        (np.array([[1.0, 2.0], [2.0, 1.0]]), "eigenvalue -1"),
    ],
)
def test_vendi_refuses_what_is_no_similarity(k, said):
    with pytest.raises(ValueError, match=said):
        vendi(k)


@pytest.mark.parametrize(
    "texts, orders, expected",
    [
        (["a b c"] * 4, (1, 2, 3, 4), 1.0),
        (["42", "43", "44 45"], (1, 2, 3, 4), 3.0),  # of fewer than n words, and no two equal
        (["42", "42"], (1, 2, 3, 4), 1.0),
        (["a b", "c d", "e f"], (1, 2), 3.0),
        (["", ""], (1, 2), 1.0),
        (["", "a b"], (1,), 2.0),
        (["a b", "b a"], (1,), 1.0),  # the same words
        (["a b", "b a"], (2,), 2.0),  # in another order
    ],
)
def test_vendi_of_texts(texts, orders, expected):
    assert vendi_of_texts(texts, orders) == pytest.approx(expected)


def test_vendi_of_texts_by_hand():
    """Counts (1, 1, 0) and (1, 0, 1), and (2, 1, 0): cosines 1/2, 3/sqrt(10) and 2/sqrt(10); pairs have none in common
    but the first and the last; longer runs, none."""
    a, b, c = 1 / 2, 3 / math.sqrt(10), 2 / math.sqrt(10)
    words = np.array([[1, a, b], [a, 1, c], [b, c, 1]])
    pairs = np.array([[1, 0, 1 / math.sqrt(2)], [0, 1, 0], [1 / math.sqrt(2), 0, 1]])
    texts = ["x y", "x z", "x y x"]
    assert vendi_of_texts(texts, (1,)) == pytest.approx(vendi(words))
    assert vendi_of_texts(texts, (1, 2)) == pytest.approx(vendi((words + pairs) / 2))
    assert vendi_of_texts(texts) == pytest.approx(vendi((words + pairs + 2 * np.eye(3)) / 4))
