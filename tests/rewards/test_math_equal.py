r"""What counts as equal: each kind with what must be right and what must be wrong beside it.

A line is a gold answer, then after "==" what equals it, and after "!=" what does not; several are parted by " | ".
"""

from __future__ import annotations

import pytest

from flowrl_mega.config import MathSettings, RewardSettings
from flowrl_mega.rewards import math

SETTINGS = RewardSettings(function="-", math=MathSettings(timeout_s=20))

KINDS = {
    "numbers with an exponent": r"""
4.5e33 == 4.5 \times 10^{33} | 4.5\cdot10^{33} | 4.5E33 | 4.5e+33 | 45e32 | 4.5 \times 10^{33} \text{ erg} | 4.5×10³³
4.5e33 != 4.5 \times 10^{32} | 4.5e | 148.5e | 4.6e33 | 4.5e^{33} | -4.5e33
6.5e-2 == 0.065 | 6.5 \times 10^{-2} | 0.0650 | \frac{13}{200}
6.5e-2 != 0.65 | 0.0065 | 6.5e - 2
1e-5 == 0.00001 | 10^{-5} | 1 \times 10^{-5}
1e-5 != 0 | 0.0001 | e-5 | -5e
2e27 != 54e | 27e^2
1e16 == 10000000000000000 | 10^{16} | 1e+16
1e16 != 1e15 | 10000000000000001
2.5x10^3 == 2500 | 2,500
3e == e+2e | e \cdot 3
3e != 3
(1.5e3, 2) == (1500, 2)
(1.5e3, 2) != (150, 2)
x=1.5e3 == 1500 | x = 1.5\times10^3
""",
    "exact numbers": r"""
6.6 \times 10^{-34} == 6.6e-34 | 66 \times 10^{-35}
6.6 \times 10^{-34} != 1.6\times 10^{-19} | 0 | 6.6 \times 10^{-35}
\frac{1}{2^{80}} == 2^{-80} | \frac{1}{4^{40}}
\frac{1}{2^{80}} != \frac{1}{2^{81}} | 0 | 0.0
10^{20}+1 != 10^{20}
\sqrt{2} \cdot 10^{-20} != \sqrt{3} \cdot 10^{-20}
(10^{-9}, 1) != (2 \times 10^{-9}, 1) | (0, 1)
0.1234567 != 0.1234568 | 0.123457
1 != 0.9999999 | 1.0000001
\frac{1}{3} == 0.333333 | 0.33333333
\frac{1}{3} != 0.33333 | 0.333334444 | 0.333
\frac{2}{3} == 0.666667
10^{-16}x != 2 \cdot 10^{-16}x
10^{-16}abcdgh != 2 \cdot 10^{-16}abcdgh
0 != \sqrt{2} \cdot 10^{-20}
\sqrt{2} \cdot 10^{-7} != \sqrt{2} \cdot 10^{-7}+10^{-20}
(1+\sqrt{2})^2-3-2\sqrt{2} == 0
0.5x == \frac{x}{2}
\frac{x}{3} != 0.3333x
\{0.1234567\} == 0.12345670 | \{0.12345670\}
\{0.1234567\} != 0.1234568 | \{0.1234568\}
\left\{0.1234567, 1\right\} == \{1, 0.1234567\} | 1, 0.1234567 | \left \{1, 0.1234567\right \}
\left\{0.1234567, 1\right\} != \left\{0.1234568, 1\right\} | \left \{0.1234568, 1\right \}
(0.1234567, 1) == (0.12345670, 1.0)
(0.1234567, 1) != (0.1234568, 1) | x=0.1234568, y=1
0.1234567, 1 == 1, 0.1234567
0.1234567, 1 != 0.1234568, 1 | x=0.1234568, x=1
\{0.1234567, 1\} != \{0.1234568, 1\}
x=0.1234567, x=1 != 0.1234568, 1
""",
    "percent": r"""
12.5\% == 12.5 | 0.125 | \frac{1}{8} | 12.5% | 12.50\% | \frac{25}{2}\%
12.5\% != 125 | 1.25 | 0.0125 | 13\%
12.5 == 12.5\% | 12.5 percent | 12.5 \text{ percent} | 12.5\text{\%} | 12.5 \mathrm{pct}
12.5 != 13 \text{ percent} | 12.5 \text{ percent or more} | 12.5 \text{ percentiles or so}
12.5\text{ percent} == 12.5 | 0.125 | 12.5\%
12.5\text{ percent} != 1.25 | 12.5\text{ percent or more}
12.5 != 0.125 | 1.25\%
33\frac{1}{3}\% == 33\frac13 | \frac{1}{3} | \frac{100}{3}\%
33\frac{1}{3}\% != 33 | 33.3
0.5 == 50\%
0.5 != 5\%
\frac{1}{3} != 33.3\% | 33.333\%
\frac{1}{3} == 33.3333\%
50\% == 50.0\% | \frac{2}{2^2} | 25 \cdot 2
50\% != 0.5\% | \frac{2}{2^3} | 7^2
x\% == x | \frac{x}{100} | x \%
x\% != 100x | 2x
\frac{2}{2^2} == 50\%
\frac{2}{2^2} != 5\%
""",
    "equations": r"""
x^2-2x+10=0 == 2x^2-4x+20=0 | x^2+10=2x | 0 = x^2-2x+10
x^2-2x+10=0 != 1=2 | 1=1 | x^2-2x+11=0 | 0
I=5 == 5 | I = 5 | 5 = I
I=5 != I=7 | 7 | J=5
I=e^{-t} == e^{-t} | I = \frac{1}{e^t}
I=e^{-t} != I=2e^{-t} | 2e^{-t}
e=\frac{1}{2} == 0.5 | e = 0.5
e=\frac{1}{2} != e=2 | e
\log_2 32=5 == 5 = \log_2 32 | 5
\log_2 32=5 != 1=1 | 5=5 | \log_2 16=4 | 4
\sin^2 x+\cos^2 x=1 == \cos^2 x+\sin^2 x=1
\sin^2 x+\cos^2 x=1 != 1=1 | 2=2 | x=x
\frac{d}{dx} x^2=2x == 2x
\frac{d}{dx} x^2=2x != 1=1 | \frac{d}{dx} x^3=3x^2
\begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 == -2
\begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 != \begin{vmatrix}1&2\\3&5\end{vmatrix}=-1 | -2=-2 | 1=1
y=2x+1 == 2x-y+1=0 | y - 2x = 1 | 2y=4x+2 | 2x+1
y=2x+1 != y=2x | 2x+y+1=0 | x=2y+1
y=\frac{1}{x} == xy=1
x^2+y^2=4 != x^2+y^2=2 | 4 | x+y=2
x+1=y+1=2 == 2x+2=2y+2=4
x+1=y+1=2 != x+1=y+1 | x+1=y+1=3
x+1=y+1 != x+1=y+1=2
2+3=4+1=5 == 5
2+2=5=4 != 4
1=2 != 3=5
\{1,2\}=\{x\} == \{2,1\}=\{x\}
\{1,2\}=\{x\} != \{1,3\}=\{x\} | 2x=4
2x=4 != \{1,2\}=\{x\}
\int_0^2 t dt=2x == 1=x | 2=2x
\begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 == \begin{vmatrix} 1 & 2 \\ 3 & 4 \end{vmatrix} = -2
\begin{vmatrix}1&2\\3&4\end{vmatrix}=-2 == \begin{vmatrix}1&2\\3&4\end{vmatrix}\,=\,-2
\det\left(\begin{pmatrix}1&2\\3&4\end{pmatrix}\right)=-2 == \det(\begin{pmatrix}1&2\\3&4\end{pmatrix})=-2
\det\left(\begin{pmatrix}1&2\\3&4\end{pmatrix}\right)=-2 != \det(\begin{pmatrix}1&2\\3&5\end{pmatrix})=-1
2A=\{2,4\} == 2A=\{4,2\}
2A=\{2,4\} != 2A=\{2,5\}
\begin{pmatrix}1&2\\3&4\end{pmatrix}=2A == \begin{pmatrix} 1&2 \\ 3&4 \end{pmatrix} = 2A
\begin{pmatrix}1&2\\3&4\end{pmatrix}=2A != \begin{pmatrix}1&2\\3&5\end{pmatrix}=2A | 2x=3
2^4=16 == 16=2^4
2^4=16 != 4^2=16
2^{-1}=\frac{1}{2} == \frac12=2^{-1}
2 \cdot 3=6 == 3 \cdot 2=6
2 \cdot 3=6 != 6 \cdot 1=6
2+2=4=\text{four} == 2 + 2 = 4 = \text{four}
2+2=4=\text{four} != 2+2=4=\text{five}
0=0 != 1=1
\sin x\cos x=\frac{1}{2}\sin 2x == \cos x\sin x=\frac{1}{2}\sin(2x)
x=\text{no way} == x = \text{no way}
x=\text{no way} != x = \text{no say}
""",
    "a number in an equation": r"""
0 != x^2-5x+6=0 | 1=0
12 == 12 = x | x = 12 | 3 \cdot 4 = 12 | AB = 12 | f(2) = 12 | \text{Area} = 12 | x_1=12
12 != 3x+4y=12 | x^2=12 | 5=12 | 12=5 | 2x=12
5 == 2+3=5
5 != 7=5 | 5=7
x+y=3 != 3
""",
    "assignments": r"""
x=3,y=4 == (3,4) | y=4, x=3 | x = 3 \text{ and } y = 4 | (x,y)=(3,4) | 3, 4 | x=3.0; y=4
x=3,y=4 != (4,3) | x=3,y=5 | x=4,y=3 | x=3 | 4, 3 | x=3,z=4 | (3,4,5)
a=1,b=2,c=3 == (1,2,3) | c=3, a=1, b=2
a=1,b=2,c=3 != (3,2,1) | (1,2)
m=2, n=5 == 2, 5 | (2, 5)
m=2, n=5 != 5, 2
(3,4) == x=3, y=4
2, 5 == m=2, n=5 | n=5, m=2
2, 5 != m=2, n=6
a=5 \text{ cm}, b=3 \text{ cm} == (5,3)
(5,3) == a=5 \text{ cm}, b=3 \text{ kg}
1, x == x, 1
1, x != 1, 2
1, 2 != 1, x
(3,4) != x=4, y=3
x=1, x=2 == 2, 1 | x=2 \text{ or } x=1 | \{1,2\} | x = 1, 2
x=1, x=2 != 1 | 1, 3 | y=1, y=2
""",
    "text after a number": r"""
5 == 5 \text{ cm} | 5\text{ apples} | 5 \mathrm{~kg} | 5 \text{ m/s}^2 | 5 \text{ square units} | 5 \text{ kg m}^{-1}
5 != 5\text{7} | 5\text{/7} | 5 \text{ or 6 or 7} | 5 \text{ dozen eggs} | 5 \text{ is wrong} | 5\text{.5}
5 != 5 \text{ million} | 5\mathrm{i} | 5 \text{ million dollars}
5 != 5 \text{ or} | 5\text{ plus 2} | 5 \text{ or more} | 5\text{ and a half}
3000000 == 3 \text{ million} | 3 million | 3 \text{ million dollars}
3000000 != 3 \text{ thousand} | 3
57 == 5\text{7}
5 \text{ or} == 5\text{ or }
5 \text{ or} != 5 | 6 \text{ or}
5 \text{ or more} == 5\text{or more}
5 \text{ or more} != 5 | 6 \text{ or more} | 5 \text{ or less}
36 == 3 \text{ dozen eggs}
42 == 42 \frac{\text{m}}{\text{s}} | 42 \text{ m} \cdot \text{s}^{-1} | 42 \text{ m}/\text{s} | 42\ \mathrm{m}
42 != 42 \frac{1}{2} | 42 \frac{\text{1}}{\text{2}}
6-5i == 6-5\mathrm{i}
""",
    "marks": r"""
42 == \approx 42 | = 42 | \boldsymbol{42} | \mathbf{42} | {\bf 42} | \underline{42} | \textcolor{blue}{42} | 42°
42 == \text{Answer: }42 | \text{42} | 42 \checkmark | ~42 | 42^\circ | 42^{\circ} | \color{red}{42} | 42\degree | ４２
42 != \boldsymbol{43} | \approx 43 | \textcolor{blue}{4}3 | -42 | \text{Answer: }43
3.5 == \text{3.5} | \mathrm{3.5}
3.5 != \text{3.6} | \text{35}
3 == \text{3 cm}
3 != \text{3 million} | \text{4 cm} | \text{3 or 4}
\sqrt{2} == √2 | sqrt(2) | √(2)
\sqrt{2} != √3 | 2
x^2 == x²
x^2 != x³ | x2 | 2x
\frac{\pi}{2} == pi/2 | π/2
\frac{\pi}{2} != pi | 2pi
\infty == ∞
(1,2) == （1，2）
3:2 == 3：2
\frac{1}{2} == ½
""",
    "words": r"""
No == \text{no} | no. | $\text{No}$ | \(\text{no}\)
No != on | ON | $\text{on}$
$No$ == no
$\text{None}$ == none | \text{NONE}
$\text{None}$ != \text{one}
\text{pi radians} == pi radians
\text{pi radians} != 2 radians
\text{None} == $\text{none}$ | \boldsymbol{\text{none}} | \text{Answer: }\text{none}
\text{None} != $\text{one}$ | \boldsymbol{\text{one}}
$\text{(C)}$ == C | \text{(C)}
$\text{(C)}$ != \text{(D)}
$abc$ == cab
IV == \text{IV}
IV != VI | 4
xy == yx
cat != act
\text{ab} == ab
\text{ab} != ba
\mbox{ab} == ab
\mbox{ab} != ba
""",
    "lists in JSON": r"""
["34"] == 34 | 34.0
["34"] != 35
["34", "36"] == 34 | 36.0
["34", "36"] != 35 | 34, 36
["\\frac{1}{2}"] == 0.5
["34", 5] != 34
[5] == 5 | 5.0
[5] != 6
[5.5] == 5.5 | \frac{11}{2}
[0.1234567] == 0.12345670
[0.1234567] != 0.1234568
[true] == [true]
[true] != [false]
[] == []
[] != [1]
[1,2] == [1, 2]
[1,2] != (1,2) | 1
""",
}


def pairs() -> list[tuple[str, str, bool]]:
    found = []
    for line in "\n".join(KINDS.values()).split("\n"):
        for sign in (" == ", " != "):
            if sign in line:
                gold, given = line.split(sign)
                found += [(gold, one.strip(), sign == " == ") for one in given.split(" | ")]
    return found


@pytest.mark.parametrize(("gold", "given", "right"), pairs())
def test_equal(gold, given, right):
    """In a box, with the settings of a run but for the time."""
    assert (math.verify({"id": "t/1", "answer": gold}, f"So it is \\boxed{{{given}}}.", SETTINGS)[0] == 1.0) == right


TWO_LETTERS = "no on up in of to is it if or go do so we he me my by ok am us al ed Dy NO On IV IX XI Ba Be Bi Bo Bu By"


@pytest.mark.parametrize("word", TWO_LETTERS.split())
def test_words_of_two_letters(word):
    """No products; in words capitals do not count."""
    for given, right in ((word, True), (word[::-1], False), (word.swapcase(), True)):
        assert (math.verify({"answer": word}, f"\\boxed{{{given}}}", SETTINGS)[0] == 1.0) == right


def test_the_longest_answer():
    """On both sides: 1000 characters."""
    for length, right in ((1000, True), (1001, False)):
        text = "1".rjust(length, "0")
        assert (math.verify({"answer": "1"}, f"\\boxed{{{text}}}", SETTINGS)[0] == 1.0) == right
        assert (math.check_gold(text) is None) == right


def test_gold_answers_in_blanks():
    for answer, given in ((' ["34", "36"] ', "34"), (" [1000]", "1,000"), ("[1000]\n", "1,000")):
        assert math.verify({"answer": answer}, f"\\boxed{{{given}}}", SETTINGS)[0] == 1.0
    for answer in ("[]", '["34", " "]'):
        assert math.check_gold(answer) is None
        assert math.verify({"answer": '["34", " "]'}, "\\boxed{34}", SETTINGS)[0] == 0.0


def test_as_many_as_written():
    """A sign without its spaces would drop its line."""
    assert len(pairs()) > 250
