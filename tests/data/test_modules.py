"""What the tests of rows import: known when a store is made, and asked of its header when a run begins."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from byte_tokenizer import byte_tokenizer

from flowrl_mega.data.load_prompts import modules_of
from flowrl_mega.data.modules import modules_of_tests
from flowrl_mega.data.prepare.make_store import Plan, prepare
from flowrl_mega.data.prompts import tokenized
from flowrl_mega.data.store import MappedStore

CHECK = "def check(candidate):\n    assert candidate(1)\n"
STUB = 'def f(x):\n    """A docstring that says import words."""\n'


@pytest.mark.parametrize(
    "code, stub, expected",
    [
        (CHECK, STUB, set()),
        (f"import numpy as np\n{CHECK}", STUB, {"numpy"}),
        (f"import os.path, scipy.stats\n{CHECK}", f"from numpy.linalg import det\n{STUB}", {"os", "scipy", "numpy"}),
        (f"{CHECK}    import sympy\n", STUB, {"sympy"}),
        (f"if True:\n    from pandas import Series\n{CHECK}", STUB, {"pandas"}),
        (f"try:\n    import numba\nexcept ImportError:\n    pass\n{CHECK}", STUB, set()),
        (f"from . import beside\nfrom .numpy import beside\n{CHECK}", STUB, set()),
        (CHECK, "def f(x):", set()),
        ("not code at all", STUB, set()),
        (f"text = 'import numpy'\n{CHECK}", STUB, set()),
    ],
)  # fmt: skip
def test_what_tests_cannot_do_without(code: str, stub: str, expected: set[str]) -> None:
    """By the first part of the name; not what may be missing, nor what only stands in a text."""
    assert modules_of_tests({"tests": {"type": "check", "name": "f", "code": code, "stub": stub}}) == expected


@pytest.mark.parametrize("row", [{}, {"tests": None}, {"tests": {"type": "stdin", "code": "import numpy"}}])
def test_other_tests_import_nothing(row: dict) -> None:
    assert modules_of_tests(row) == set()


def test_a_store_knows_its_modules_and_preparing_says_what_programs_lack(tmp_path: Path) -> None:
    """numpy is there by default, and the standard library: neither is worth a line."""
    codes = [f"import {names}\n{CHECK}" for names in ("numpy, math", "scipy", "scipy, numba")]
    records = [
        {"prompt": STUB.replace("f(", f"f{i}("), "entry_point": "f", "test": code} for i, code in enumerate(codes)
    ]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    report = prepare(Plan("humaneval+", tmp_path / "s", [str(tmp_path / "in.jsonl")]), byte_tokenizer(), None)
    said = [line for line in str(report).splitlines() if "import" in line]
    assert [line.partition(", which programs do not have")[0] for line in said] == [
        "the tests of 2 row(s) import scipy",
        "the tests of 1 row(s) import numba",
    ]
    assert all("reward.code.packages" in line and "reward.code.python" in line for line in said)
    store = MappedStore(tmp_path / "s")
    expected = {"numpy", "math", "scipy", "numba"}
    assert modules_of(store) == set(store.header["modules"]) == expected
    del store.header["modules"]  # as an earlier version made it
    assert modules_of(store) == expected
    assert modules_of(tokenized([prompt.row for prompt in store], byte_tokenizer())) == expected
