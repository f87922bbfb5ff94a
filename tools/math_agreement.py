"""How far DAPO's rule and math-verify agree: a Markdown table (docs/rewards.md) over data files and the tests' pairs.

    python tools/math_agreement.py --data DIR

Every distinct gold answer of a file is graded in up to three forms: as it is; rewritten as models write it (\\dfrac for
\\frac, 27 for 27.0, without $, unit or "x ="), where that changes it; and the next problem's answer that differs. Both
rules read the same response, 2 KB that end in an "Answer:" line. How fast they are says benchmarks/rewards.py.
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from pathlib import Path

from flowrl_mega.rewards.minerva import normalise

FILES = "aime24 aime25 amc23 math500 olympiadbench gsm8k_test gsm8k_train flowrl_train_aime flowrl_train_math".split()
PAIRS = Path(__file__).parents[1] / "tests/rewards/math_pairs.tsv"
THOUGHTS = "Let us see what follows from that, step by step.\n" * 40
HEAD = """| answers | form | graded | both right | both wrong | DAPO only | math-verify only |
| --- | --- | --- | --- | --- | --- | --- |"""


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of JSON lines with 'answer'")
    return parser


def main() -> None:
    data: Path = parser().parse_args().data
    from flowrl_mega.rewards.math import check_gold  # imports sympy, so only after the arguments have been looked at

    print(HEAD)
    for name in FILES:
        if not (path := data / f"{name}.jsonl").exists():
            print(f"| {name} | no file |")
            continue
        with path.open() as lines:
            golds = list(dict.fromkeys(json.loads(line)["answer"] for line in lines))
        usable = [gold for gold in golds if check_gold(gold) is None]
        for form, pairs in forms(usable).items():
            if pairs:
                print(row(f"{name} ({len(usable)})", form, pairs), flush=True)
    for equal, pairs in table_pairs().items():
        print(row("table of pairs", equal, pairs))


def forms(golds: list[str]) -> dict[str, list[tuple[str, str]]]:
    """Pairs of a gold answer and a given one, by the form of the given one."""
    rewritten = [(gold, given) for gold in golds if (given := rewrite(gold)) != gold]
    return {
        "itself": [(gold, gold) for gold in golds],
        "rewritten": rewritten,
        "another's": [(gold, another(golds, i)) for i, gold in enumerate(golds)],
    }


def rewrite(answer: str) -> str:
    """The same answer, as a model might write it."""
    answer = re.sub(r"\\?\$", "", answer).replace("\\frac", "\\dfrac").removesuffix(".0")
    answer = re.sub(r"^\w=", "", answer)
    return re.sub(r"(?<=\d)\s*(?:\^\\circ|\\text\s*\{[^{}]*\})$", "", answer)


def another(golds: list[str], i: int) -> str:
    following = golds[i + 1 :] + golds[:i]
    return next(gold for gold in following if normalise(gold) != normalise(golds[i]))


def table_pairs() -> dict[str, list[tuple[str, str]]]:
    """The tests' table, by what a mathematician says."""
    rows = [line.split("\t") for line in PAIRS.read_text().splitlines() if not line.startswith("#")]
    return {
        "equal": [(gold, given) for gold, given, equal, *_ in rows if equal == "yes"],
        "not equal": [(gold, given) for gold, given, equal, *_ in rows if equal == "no"],
    }


def row(name: str, form: str, pairs: list[tuple[str, str]]) -> str:
    from flowrl_mega.rewards.math import dapo, verify

    calls = [({"id": name, "answer": gold}, f"{THOUGHTS}\nAnswer: {given}") for gold, given in pairs]
    count = Counter((dapo(*call)[0] > 0, verify(*call)[0] > 0) for call in calls)
    verdicts = [count[both] for both in ((True, True), (False, False), (True, False), (False, True))]
    return f"| {' | '.join(map(str, [name, form, len(calls), *verdicts]))} |"


if __name__ == "__main__":
    main()
