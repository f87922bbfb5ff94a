"""Which of a response's blocks is its program, and what of it."""

from __future__ import annotations

import gc
import time

import pytest

from flowrl_mega.rewards.code.answer import program

STDIN = {"type": "stdin"}
STUB = {"type": "check", "stub": "def f(x):\n"}
DOCSTRING = 'def g():\n    """doc\n    ```\n    example\n    ```\n    """\n    return 1\n'
AT_MARGIN = DOCSTRING.replace("    ```\n", "```\n")
# Each hides quotes in a comment or a string, or has a whole string before one.
HIDING = [
    "# '''",
    '# """',
    'x = """a"""\'"""\'',
    'x = \'"""\'',
    "x = \"'''\"",
    "x = 'a\\'\"\"\"'",
    "x = \"a\\\"'''\"",
    'x = \'"""',
    "x = \"'''",
]
COMMENT = "x = 1  # don't '''\ny = '\"\"\"' + \"it's\"\n"


@pytest.mark.parametrize(
    "response, found",
    [
        ("```python\na\n```", "a\n"),
        ("```\na\n```", "a\n"),
        ("```py\na\n```\ntext\n```python\nb\n```", "b\n"),
        ("```python\na\n```\nIts output:\n```\n5\n```", "a\n"),
        ("```python\nnever closed", None),
        ("no code at all", None),
        ("`a` and ``b``", None),
        ("", None),
        ("```python\n```", ""),
        # Languages
        ("```PYTHON\na\n```", "a\n"),
        ("```py3\na\n```", "a\n"),
        ("```python3.11\na\n```", "a\n"),
        ("```python:main.py\na\n```", "a\n"),
        ("```{python}\na\n```", "a\n"),
        ("```{.python .numberLines}\na\n```", "a\n"),
        ("``` python title=x\na\n```", "a\n"),
        ("```text\na\n```", None),
        ("```python-repl\na\n```", None),
        ("```pycon\na\n```", None),
        ("```python2\na\n```", None),
        ("```text\na\n```\n```\nb\n```", "b\n"),
        *((f"```{tag}\na\n```", None) for tag in ("python++", "python#", "python.el", "python_x", "pythons")),
        # Before the fence
        *((f"{mark}```\na\n```", "a\n") for mark in ("- ", "* ", "+ ", "> ", "1. ", "12)", "-\t", "\t", "  ", "<a>- ")),
        *((f"{mark} ```\na\n```", None) for mark in ("1234567890.", "<a b>", "<<a>", "<a>b>", "<a`b>", "x", "1,")),
        ("The code: ``` Python \na\n```", "a\n"),
        ("The code: ```{python}\na\n```", "a\n"),
        ("The code: ```python x\na\n```", None),
        ("Not ```x``` but ```python\na\n```", None),
        # Margins
        ("  ```python\n  a\n  ```", "a\n"),
        ("1. Code:\n\n   ```python\n   if a:\n       b\n   ```\n", "if a:\n    b\n"),
        ("1. ```python\n   a\n   ```", "a\n"),
        ("- Code:\n\n  ```python\n    a\n    b\n  ```", "a\nb\n"),
        ("   ```python\nif a:\n    b\n   ```", "if a:\n    b\n"),
        ("   ```python\n   a = '''\n x\n   '''\n   ```", "a = '''\nx\n'''\n"),
        ("```python\n\tif a:\n\t\tb\n```", "if a:\n\tb\n"),
        ("```python\na\n  ```", "a\n"),
        ("```python\na\n\t```", "a\n"),
        ("   ```python\n\nif a:\n    b\n   ```", "\nif a:\n    b\n"),
        ("   ```python\n   \nif a:\n    b\n   ```", "\nif a:\n    b\n"),
        # Fences inside
        *((f"```python\n{line}\n```\nmore ''' and \"\"\"\n```\nb\n```", f"{line}\n") for line in HIDING),
        *((f"```python\n{line}\n    ```", f"{line}\n") for line in [*HIDING, "x = 'a'", 'x = "a"', "x  # a"]),
        *(
            (f"```python\nx = {before}{quotes}\n```\n{quotes}\n```", f"x = {before}{quotes}\n```\n{quotes}\n")
            for before in ("", "'a' + ", '"a" + ')
            for quotes in ("'''", '"""')
        ),
        ("```python\n'''\n```\n'''\na\n```", "'''\n```\n'''\na\n"),
        ("```python\n'''\n```python\nx\n```\n'''\na\n```", "'''\n```python\nx\n```\n'''\na\n"),
        ("```text\n'''\n```\nSo '''\n```\nb\n```", "b\n"),
        (f"```python\n{DOCSTRING}```\n", DOCSTRING),
        (f"```python\n{AT_MARGIN}```\n", AT_MARGIN),
        (f"  ```python\n{DOCSTRING}  ```\n", DOCSTRING),
        (f"```\n{DOCSTRING}```\n", DOCSTRING),
        (f"```python\n{COMMENT}```\nmore '''\n```\nb\n```", COMMENT),
        ("````python\na\n```\nb\n````", "a\n```\nb\n"),
        ("```python\n# ```\na\n```", "# ```\na\n"),
        ("```python\n'''broken\n```\nNow:\n```python\n'''b'''\n```", "'''b'''\n"),
        ("```python\n'''broken\n```\nThe end", "'''broken\n"),
        ("```python\n'''broken\n```\nNow:\n```python\nx = '''a\nb'''\n```", "x = '''a\nb'''\n"),
        ("```python\n'''broken\n```\ntext\n```\nThe end", "'''broken\n"),
        ("```python\n'''broken\n    ```\nThe end", None),
        ("```python\nx = '''\n```\n'''\ny = '''\nbroken", None),
        ("```\n'''broken\n```\nThen:\n```\nb\n```", "b\n"),
        ("```\n'''broken\n```\n```\nb\n```", "b\n"),
        ("```python\ndraft\n\nAgain:\n```python\na\n```", "a\n"),
        ("```python\ndraft\n\nAgain:\n``` python\na\n```", "a\n"),
        # Around the fences
        ("```python\r\na\r\nb\r\n```\r\n", "a\nb\n"),
        ("```python\na\n```<|im_end|>", "a\n"),
        ("```python\na\n```</answer>", "a\n"),
        ("```python\na\n```That is all.", "a\n"),
        ("<answer>```python\na\n```\n</answer>", "a\n"),
        ("<answer>```\na\n```\n</answer>", "a\n"),
        ("The code: ```python\na\n```", "a\n"),
        ("Write ```python and then ```\na\n```", None),
        # Drafts
        ("<think>\n```python\na\n```\n</think>\n```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\n```\nb\n```", "b\n"),
        ("<think>\n```python\nnever closed\n</think>```python\nb\n```", "b\n"),
        ("<think>\n```python\na\n```\n</think>\nI do not know.", None),
        ("<think>\n```python\na\n```\n</think>\n<|im_end|>", "a\n"),
        *((f"<think>\n```python\na\n```\n</think>\n{rest}", None) for rest in ("<a b>", "<<a>", "<a>b>")),
        *(
            (f"```python\nprint({said})\n```", f"print({said})\n")
            for said in ("'</think>'", "'</think> '", "' </think>'", '"</think> "', '" </think>"')
        ),
    ],
)
def test_the_program_of_a_response(response, found):
    """The last Python block: models write the output of a program in a block without a language behind it."""
    assert program(response, STDIN) == found


@pytest.mark.parametrize(
    "response, found",
    [
        ("    return x\n", "    return x\n"),
        ("```python\n    return x\n```", "    return x\n"),
        ("  ```python\n      return x\n  ```", "    return x\n"),
        ("<think>\nHm.\n</think>\n    return x\n", "\n    return x\n"),
        ("Code: ```python\n    return x\n```", "    return x\n"),
        ("Use ```", None),
        ("  \n", None),
    ],
)
def test_the_completion_of_a_stub(response, found):
    """Its indentation is its own; no fence at all is needed."""
    assert program(response, STUB) == found


@pytest.mark.parametrize(
    "text",
    [
        "```python\n",
        "```python\na\n```\n",
        "```\n'''\n",
        "```python\n\\'''\n```\n",
        "'''\n```\n\"\"\"\n",
        "```",
        "```x`",
    ]
    + ["<a>", "- ", " ", "\n", "</think>", '"', "'\\", "<"],
)
def test_the_time_grows_with_the_text(text):
    """Of degenerate answers, which repeat themselves: 3,200 times and more."""
    for answer in (text * 6400, "```python\n" + text * 6400 + "\n```"):
        gc.freeze()  # a collection in between would look at all that thousands of other tests have left
        started = time.process_time()
        program(answer, STDIN)
        taken = time.process_time() - started
        gc.unfreeze()
        assert taken < 0.3  # tens of milliseconds; where it grows with the square, seconds
