"""Published data sets to a prompt store: tokenised prompts that the trainer maps into memory (data.path).

    python tools/prepare_data.py --recipe gsm8k --input train.jsonl --model HF_FOLDER --out DIR
    python tools/prepare_data.py --recipe reasoning-gym --task gcd products --count 5000 --model HF_FOLDER --out DIR
    python tools/prepare_data.py --verify DIR

Inputs are files of JSON lines, .parquet files, folders, or ids of Hugging Face data sets (NAME or NAME:CONFIG). What is
not stored is counted, and listed with file, row and reason in DIR/refused.jsonl.
Exit codes: 0 done; 2 the input is wrong, or no row of it can be kept (one message); anything else is a fault.
"""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Sequence
from datetime import date
from functools import lru_cache
from pathlib import Path
from typing import Any

from flowrl_mega.config import ConfigError
from flowrl_mega.data.prepare.contamination import NEAR
from flowrl_mega.data.prepare.recipes import GENERATED, RECIPES, recipe

DONE, BAD_INPUT, INTERRUPTED = 0, 2, 130


def main(arguments: Sequence[str] | None = None) -> int:
    """Prepare one store; returns the exit code."""
    options = parser().parse_args(arguments)
    previous = signal.signal(signal.SIGTERM, _leave)  # as an exception, so that what is half written goes
    try:
        return verify(options.verify) if options.verify else prepare(options)
    except (ConfigError, OSError) as error:
        print(f"prepare_data: {error}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        return INTERRUPTED
    finally:
        signal.signal(signal.SIGTERM, previous)


def parser() -> argparse.ArgumentParser:
    recipes = "\n".join(f"  {name:<14} {r.datasets}" for name, r in RECIPES.items()) + f"\n  {GENERATED}"
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"recipes and their data sets:\n{recipes}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    add = parser.add_argument
    add("--recipe", help="how records become prompts, see below; or your own, as path/to/file.py:function")
    add("--input", nargs="+", default=[], help="files, folders or ids; read in this order")
    add("--model", type=Path, help="Hugging Face folder with the tokenizer that the model is trained with")
    add("--out", type=Path, help="the store, a folder to be made")
    add("--split", default="train", help="of a data set; and the middle of the rows' ids (gsm8k/train/17)")
    add("--columns", nargs="+", default=[], metavar="OURS=THEIRS", help="columns with other names, as answer=solution")
    add("--wording", choices=("boxed", "answer"), help="how to answer: in \\boxed{}, or after 'Answer:' (DAPO's rule)")
    add("--chat-template", action=argparse.BooleanOptionalAction, default=False, help="apply the tokenizer's")
    add("--template-date", type=_day, default="2024-07-26", help="for templates that write the date")
    add("--max-prompt-tokens", type=int, default=2048, help="longer prompts are refused (default 2048)")
    add("--against", nargs="+", default=[], help="test sets: which of their problems are in the training set?")
    add(
        "--drop-contaminated",
        nargs="?",
        type=float,
        const=NEAR,
        metavar="SHARE",
        help="leave out training rows of the same words as a test problem, or with this share of its runs (0.5)",
    )
    add("--task", nargs="+", default=[], help="reasoning-gym: names of its tasks")
    add("--count", type=int, default=1000, help="reasoning-gym: problems a task")
    add("--seed", type=int, default=0, help="reasoning-gym")
    add("--task-args", default="{}", help='reasoning-gym: its settings of the task as JSON, {"max_digits": 1}')
    add("--verify", type=Path, metavar="DIR", help="compare a store's files with their checksums, and no more")
    return parser


def prepare(options: argparse.Namespace) -> int:
    from flowrl_mega.data.prepare.make_store import REFUSED, Plan
    from flowrl_mega.data.prepare.make_store import prepare as make

    for name in ("recipe", "model", "out"):
        if getattr(options, name) is None:
            raise ConfigError(f"--{name} is missing; --help shows an example")
    if options.recipe != GENERATED:
        recipe(options.recipe)  # before the tokenizer is loaded
    from flowrl_mega.data.fit import model_vocabulary
    from flowrl_mega.data.load_prompts import load_tokenizer

    plan = Plan(
        recipe=options.recipe,
        out=options.out,
        inputs=options.input,
        split=options.split,
        columns=_pairs(options.columns),
        wording=options.wording,
        chat_template=options.chat_template,
        template_date=options.template_date,
        max_prompt_tokens=options.max_prompt_tokens,
        against=options.against,
        drop_share=options.drop_contaminated,
        tasks=options.task,
        count=options.count,
        seed=options.seed,
        task_args=_object(options.task_args),
        vocab=model_vocabulary(options.model),
    )
    report = make(plan, load_tokenizer(str(options.model)), _gold_check())
    print(report)
    print(f"{options.out} is ready" + (f"; {REFUSED} in it lists what was refused" if report.refused else ""))
    return DONE


def verify(path: Path) -> int:
    from flowrl_mega.data.store import MappedStore

    store = MappedStore(path)
    store.verify()
    print(f"{path}: {len(store)} prompts, as they were written")
    return DONE


def _gold_check() -> Any:
    """Whether an answer can be graded at all; the same answers come again and again."""
    try:
        from flowrl_mega.rewards.math import check_gold
    except ImportError as error:
        print(f"prepare_data: answers are not checked ({error})", file=sys.stderr)
        return None
    return lru_cache(maxsize=1 << 16)(check_gold)


def _pairs(columns: list[str]) -> dict[str, str]:
    pairs = [text.split("=", 1) for text in columns]
    for pair in pairs:
        if len(pair) != 2 or not all(pair):
            raise ConfigError(f"--columns {pair[0]}: must be OURS=THEIRS, as answer=solution")
    return {ours: theirs for ours, theirs in pairs}


def _day(text: str) -> date:
    try:
        return date.fromisoformat(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no day; write one as 2024-07-26") from None


def _object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise ConfigError(f"--task-args {text}: must be a JSON object")
    return value


def _leave(signum: int, frame: object) -> None:
    sys.exit(128 + signum)


if __name__ == "__main__":
    sys.exit(main())
