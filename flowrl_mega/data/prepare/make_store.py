"""From published records to a prompt store: every record is stored, or counted and listed with the reason."""

from __future__ import annotations

import hashlib
import json
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Container, Iterator
from dataclasses import dataclass, field
from datetime import date
from pathlib import Path
from typing import Any, NamedTuple, TextIO

from flowrl_mega.config import CodeSettings, ConfigError
from flowrl_mega.data.chat import TEMPLATE_DATE, check_template, faults_of, render, writes_the_date
from flowrl_mega.data.fit import CURE, beyond
from flowrl_mega.data.prepare import contamination
from flowrl_mega.data.prepare.problem import BAD_ANSWER, BROKEN, EMPTY, BadRow, Problem
from flowrl_mega.data.prepare.recipes import GENERATED, Recipe, recipe
from flowrl_mega.data.prepare.sources import SHOWN, Record, records
from flowrl_mega.data.prompts import Row, encode
from flowrl_mega.data.store import decode_image, new_store
from flowrl_mega.so_far import so_far

DUPLICATE, OTHER_ANSWER, TOO_LONG = "duplicate", "duplicate with another answer", "too long"
CONTAMINATED, UNKNOWN = "contaminated", "outside the vocabulary"
REFUSED, OVERLAPS = "refused.jsonl", "contamination.json"
BATCH, BATCH_BYTES = 256, 1 << 22  # rows tokenised at a time

GoldCheck = Callable[[str], str | None]  # what is wrong with an answer, or None


@dataclass(frozen=True)
class Plan:
    """The options of tools/prepare_data.py. `tasks`, `count`, `seed` and `task_args` are for reasoning-gym only."""

    recipe: str
    out: Path
    inputs: list[str] = field(default_factory=list)
    split: str = "train"
    columns: dict[str, str] = field(default_factory=dict)  # the recipe's name -> that of the input
    wording: str | None = None  # "boxed" or "answer"; None: the recipe's
    chat_template: bool = False
    template_date: date = TEMPLATE_DATE
    max_prompt_tokens: int = 2048
    against: list[str] = field(default_factory=list)
    against_split: str = "test"
    drop_share: float | None = None  # drop training rows with this share of a test problem's runs; None: none
    tasks: list[str] = field(default_factory=list)
    count: int = 1000
    seed: int = 0
    task_args: dict[str, Any] = field(default_factory=dict)
    vocab: int | None = None  # token ids that the model has rows for; None: not known


class Item(NamedTuple):
    """A record with the problem made from it, row and all; or None, and why it is refused."""

    record: Record
    problem: Problem | None
    reason: str = ""
    detail: str = ""


@dataclass
class Report:
    """Rows read = kept + the sum of `refused`."""

    read: int = 0
    kept: int = 0
    tokens: int = 0
    longest: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    first: dict[str, str] = field(default_factory=dict)  # of each reason
    overlaps: list[contamination.Overlap] = field(default_factory=list)
    missing: dict[str, int] = field(default_factory=dict)  # modules that programs lack by default: rows with such tests
    date: str = ""  # that the chat template wrote, if it writes one

    def __str__(self) -> str:
        lines = [f"{self.kept} of {self.read} rows kept: {self.tokens} tokens, the longest prompt {self.longest}"]
        lines += [f"  {n:>8}  {reason:<29}  {self.first[reason]}" for reason, n in self.refused.most_common()]
        lines += (
            [f"the chat template writes the date: it is {self.date} in every prompt (--template-date)"]
            if self.date
            else []
        )
        lines += [
            f"the tests of {rows} row(s) import {name}, which programs do not have by default: name it with "
            "reward.code.packages, where it is installed, or give an interpreter with it as reward.code.python"
            for name, rows in self.missing.items()
        ]
        lines += ["", contamination.table(self.overlaps)] if self.overlaps else []
        return "\n".join(lines)


def prepare(plan: Plan, tokenizer: Any, check_answer: GoldCheck | None) -> Report:
    """Make the store at `plan.out`. ConfigError where nothing can be read or kept; nothing is left behind then, but the
    list of what was refused as OUT.refused.jsonl.
    """
    _check(plan, tokenizer)
    report = Report()
    if plan.against:
        tests = [contamination.read_test_set(name, plan.against_split) for name in plan.against]
        report.overlaps = contamination.find(_texts(plan, check_answer), tests)
    share = plan.drop_share
    dropped = set().union(*(found.train_ids(share) for found in report.overlaps)) if share is not None else set()
    made = {
        key: value
        for key, value in vars(plan).items()
        if key not in ("out", "template_date", "vocab") and value not in (None, [], {})
    }
    made |= {"inputs": [Path(name).name for name in plan.inputs], "against": [Path(n).name for n in plan.against]}
    made["recipe"] = Path(plan.recipe).name
    if plan.chat_template and writes_the_date(tokenizer):
        report.date = made["template_date"] = str(plan.template_date)
    with new_store(plan.out, tokenizer, chat_template=plan.chat_template, made=made) as writer:
        kept_so_far = so_far("preparing", count=lambda: f"{writer.count} rows kept")
        with kept_so_far, (writer.folder / REFUSED).open("w") as listed:
            kept = _kept(_items(plan, check_answer), dropped, report, listed)
            for item, ids in _tokenised(kept, plan, tokenizer, report, listed):
                assert item.problem and isinstance(item.problem.image, bytes)
                writer.add(ids, item.problem.row, item.problem.image)
        known = {*sys.stdlib_module_names, *CodeSettings().packages}
        report.missing = {name: rows for name, rows in writer.modules.most_common() if name not in known}
        report.kept, report.tokens, report.longest = writer.count, writer.written["tokens"], writer.longest
        if not report.kept:
            raise _nothing_kept(plan, report, writer.folder / REFUSED)
        if report.overlaps:
            found = [found._asdict() for found in report.overlaps]
            (writer.folder / OVERLAPS).write_text(json.dumps(found, indent=1))
    return report


def _check(plan: Plan, tokenizer: Any) -> None:
    if plan.recipe == GENERATED:
        if plan.inputs or not plan.tasks:
            raise ConfigError(f"--recipe {GENERATED}: makes its problems; give --task NAME, and no --input")
    else:
        recipe(plan.recipe)
        if not plan.inputs:
            raise ConfigError(f"--recipe {plan.recipe}: needs --input; its data set is {recipe(plan.recipe).datasets}")
    if plan.chat_template and not tokenizer.chat_template:
        raise ConfigError(
            f"--chat-template: the tokenizer of {tokenizer.name_or_path!r} has no chat template; leave it out, or name "
            "the folder of an instruction-tuned model with --model"
        )
    if plan.chat_template:
        check_template(tokenizer)
    if plan.drop_share is not None and not 0 < plan.drop_share <= 1:
        raise ConfigError(f"--drop-contaminated {plan.drop_share}: must be a share above 0, and 1 at most")
    if plan.drop_share is not None and not plan.against:
        raise ConfigError("--drop-contaminated: against what? name the test sets with --against")


def _nothing_kept(plan: Plan, report: Report, listed: Path) -> ConfigError:
    if not report.read:
        return ConfigError(f"--input {' '.join(plan.inputs)}: holds no rows")
    beside = plan.out.with_name(f"{plan.out.name}.{REFUSED}")
    listed.replace(beside)
    return ConfigError(f"no row can be kept, see {beside}\n{report}")


def _items(plan: Plan, check_answer: GoldCheck | None) -> Iterator[Item]:
    """Every record of the inputs, made into a whole row where that is possible."""
    if plan.recipe == GENERATED:
        yield from _generated(plan)
        return
    chosen = recipe(plan.recipe)
    for number, record in enumerate(records(plan.inputs, plan.split)):
        try:
            yield Item(record, _whole(record, number, plan, chosen, check_answer))
        except BadRow as error:
            yield Item(record, None, error.reason, str(error))


def _whole(record: Record, number: int, plan: Plan, chosen: Recipe, check_answer: GoldCheck | None) -> Problem:
    """The problem that the recipe makes from the record, with its row complete. BadRow if the record is unfit."""
    if record.value is None:
        raise BadRow(BROKEN, record.fault)
    named = record.value | {ours: record.value.get(theirs) for ours, theirs in plan.columns.items()}
    problem = chosen.make(named, plan.wording or chosen.wording)
    task = plan.recipe.rpartition(":")[2]  # of a user's recipe the function's name
    row = {"id": f"{task}/{plan.split}/{number}", "task": task, **problem.row}
    if check_answer and row.get("kind") in ("math", "math_dapo") and (wrong := check_answer(row["answer"])):
        raise BadRow(BAD_ANSWER, f"the answer {row['answer']!r:.100}: {wrong}")
    _check_row(row, plan.chat_template)
    return Problem(problem.text, row, _image(problem.image, record.folder))


def _generated(plan: Plan) -> Iterator[Item]:
    from flowrl_mega.data.prepare.reasoning_gym import make_rows

    for task in plan.tasks:
        for number, row in enumerate(make_rows(task, plan.count, plan.seed, **plan.task_args)):
            row = {"id": f"{GENERATED}/{task}/{plan.seed}/{number}", "kind": "reasoning_gym", **row}
            record = Record(f"{GENERATED}/{task}", number + 1, row, "", row["prompt"][:SHOWN], None)
            yield Item(record, Problem(row["prompt"], row))


def _check_row(row: Row, chat_template: bool) -> None:
    if isinstance(row["prompt"], list) and not chat_template:
        raise BadRow(BROKEN, "'prompt' is a list of chat messages; say --chat-template")
    for key in ("id", "task", "kind"):
        if not isinstance(row.get(key, ""), str):
            raise BadRow(BROKEN, f"{key!r} must be text")
    try:
        json.dumps(row, ensure_ascii=False, allow_nan=False).encode()
    except UnicodeEncodeError:
        raise BadRow(BROKEN, "holds half of a surrogate pair, which is no character; remove it") from None
    except (TypeError, ValueError, RecursionError) as error:
        raise BadRow(BROKEN, f"holds what JSON cannot ({error!s:.100})") from None


def _image(image: bytes | str, folder: Path | None) -> bytes:
    """The image's bytes; a path is relative to the input file's folder. BadRow if they cannot be decoded."""
    try:
        encoded = ((folder or Path()) / image).read_bytes() if isinstance(image, str) else image
        if encoded.startswith(b"GIF8"):
            raise BadRow(BROKEN, "the image is a GIF, which DALI does not decode; convert it to PNG")
        if encoded:
            decode_image(encoded)
    except BadRow:
        raise
    except (OSError, ValueError, SyntaxError) as error:  # Pillow raises all three for files that are damaged
        raise BadRow(BROKEN, f"the image cannot be read ({error!s:.100})") from None
    return encoded


def _texts(plan: Plan, check_answer: GoldCheck | None) -> Iterator[tuple[str, str]]:
    for item in _kept(_items(plan, check_answer), frozenset(), Report(), None):
        assert item.problem
        yield item.problem.row["id"], item.problem.text


def _kept(items: Iterator[Item], dropped: Container[str], report: Report, listed: TextIO | None) -> Iterator[Item]:
    """The items that have a problem, are no duplicates and are not in `dropped`; the others are refused."""
    seen: dict[bytes, tuple[bytes, str]] = {}
    for item in items:
        report.read += 1
        problem = item.problem
        if problem is None:
            _refuse(item, item.reason, item.detail, report, listed)
            continue
        text = " ".join(unicodedata.normalize("NFC", problem.text).split())
        assert isinstance(problem.image, bytes)
        key = _digest([text, hashlib.sha256(problem.image).hexdigest()])
        answer = _digest([problem.row.get("answer"), problem.row.get("tests")])
        first = seen.setdefault(key, (answer, problem.row["id"]))
        if first[1] is not problem.row["id"]:
            reason = DUPLICATE if first[0] == answer else OTHER_ANSWER
            _refuse(item, reason, f"says the same as {first[1]}", report, listed)
        elif problem.row["id"] in dropped:
            _refuse(item, CONTAMINATED, f"{problem.row['id']} is in a test set, see {OVERLAPS}", report, listed)
        else:
            yield item


def _digest(value: Any) -> bytes:
    return hashlib.blake2b(json.dumps(value, sort_keys=True).encode(), digest_size=16).digest()


def _tokenised(
    items: Iterator[Item], plan: Plan, tokenizer: Any, report: Report, listed: TextIO | None
) -> Iterator[tuple[Item, list[int]]]:
    """The items with their token ids; a prompt without tokens, with too many or with unknown ones is refused."""
    for batch in _batches(items):
        for item, ids in zip(batch, _encode(batch, plan, tokenizer), strict=True):
            if isinstance(ids, str):
                _refuse(item, BROKEN, ids, report, listed)
            elif not ids:
                _refuse(item, EMPTY, "the prompt has no tokens", report, listed)
            elif len(ids) > plan.max_prompt_tokens:
                detail = f"{len(ids)} tokens, and --max-prompt-tokens is {plan.max_prompt_tokens}"
                _refuse(item, TOO_LONG, detail, report, listed)
            elif plan.vocab is not None and (fault := beyond(ids, plan.vocab, tokenizer)):
                _refuse(item, UNKNOWN, f"{fault}; {CURE}", report, listed)
            else:
                yield item, ids


def _batches(items: Iterator[Item]) -> Iterator[list[Item]]:
    """Items in batches that fit into memory: the tests of one program may be megabytes."""
    batch: list[Item] = []
    size = 0
    for item in items:
        batch.append(item)
        size += _size(item.problem)
        if len(batch) == BATCH or size > BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _size(problem: Problem | None) -> int:
    tests = problem.row.get("tests", {}) if problem else {}
    texts = [*tests.get("inputs", ()), *tests.get("outputs", ())] if isinstance(tests, dict) else []
    return sum(len(text) for text in texts if isinstance(text, str))


def _encode(batch: list[Item], plan: Plan, tokenizer: Any) -> list[list[int] | str]:
    """For each prompt its token ids, or the words for what is wrong with it."""
    prompts = [item.problem.row["prompt"] for item in batch if item.problem]
    try:
        texts = [render(prompt, tokenizer, plan.chat_template, plan.template_date) for prompt in prompts]
        ids = encode(texts, tokenizer, plan.chat_template)
        return [fault or tokens for fault, tokens in zip(faults_of(prompts, texts, tokenizer), ids, strict=True)]
    except Exception:  # templates raise what they like, and tokenizers a bare Exception: which prompt is it?
        return [_encode_one(prompt, plan, tokenizer) for prompt in prompts]


def _encode_one(prompt: Any, plan: Plan, tokenizer: Any) -> list[int] | str:
    try:
        text = render(prompt, tokenizer, plan.chat_template, plan.template_date)
        (fault,) = faults_of([prompt], [text], tokenizer)
        return fault or encode([text], tokenizer, plan.chat_template)[0]
    except Exception as error:
        return f"the tokenizer or its chat template refuses it ({type(error).__name__}: {error!s:.100})"


def _refuse(item: Item, reason: str, detail: str, report: Report, listed: TextIO | None) -> None:
    record = item.record
    report.refused[reason] += 1
    report.first.setdefault(reason, f"{record.file}, row {record.row}: {detail}")
    if listed:
        entry = {"file": record.file, "row": record.row, "reason": reason, "detail": detail, "begins": record.begins}
        listed.write(json.dumps(entry) + "\n")
