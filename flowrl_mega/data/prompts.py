"""Prompts in memory: rows of a JSONL file or a task, tokenised once."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from flowrl_mega.config import ConfigError
from flowrl_mega.data.chat import TEMPLATE_DATE, check_template, faults_of, render

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase  # takes seconds to import, and prepare_data --help must not

Row = dict[str, Any]


@dataclass(frozen=True)
class Prompt:
    """One prompt: its index in the data set, its token ids and the row that the reward will see."""

    index: int
    token_ids: list[int]
    row: Row
    image: np.ndarray | None = None  # [height, width, 3] uint8, of a store with images


Prompts = Sequence[Prompt]  # by their index: a list, or a store that is memory-mapped


def tokenized(
    rows: Sequence[Row],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool = False,
    max_prompt_tokens: int | None = None,
    template_date: date = TEMPLATE_DATE,
) -> list[Prompt]:
    """All prompts of one data set, as token ids.

    `rows` are dicts with "prompt" (a string, or a list of chat messages) and anything else the reward needs.
    With `chat_template` a string becomes one user message and the tokenizer's template is applied; `template_date` is
    what a template that asks for today's date gets.
    """
    if not rows:
        raise ConfigError("data: there are no prompts; give at least one row")
    ids = _tokenize(rows, tokenizer, chat_template, template_date)
    _check_lengths(ids, max_prompt_tokens)
    return [Prompt(index, list(tokens), row) for index, (tokens, row) in enumerate(zip(ids, rows, strict=True))]


def read_jsonl(path: str | Path) -> list[Row]:
    """The rows of a JSONL file: one object a line, each with "prompt". Blank lines are skipped."""
    try:
        text = Path(path).read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"{path}: cannot be read ({reason}); give the path of a UTF-8 JSONL file") from None
    # Not splitlines(): JSON strings may hold U+2028 and other characters that it would break at.
    lines = enumerate(text.split("\n"), start=1)
    rows = [_parse(line, f"{path}, line {number}") for number, line in lines if line.strip()]
    if not rows:
        raise ConfigError(
            f'{path}: holds no rows; write one object a line, such as {{"prompt": "2+2=", "answer": "4"}}'
        )
    return rows


def _parse(line: str, where: str) -> Row:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise ConfigError(
            f"{where}: not valid JSON ({error.msg} at column {error.colno}); write one object a line"
        ) from None
    _check_row(row, where)
    return row


def _check_row(row: Any, where: str) -> None:
    if not isinstance(row, dict):
        raise ConfigError(f'{where}: is a {type(row).__name__}; must be an object with "prompt"')
    if "prompt" not in row:
        raise ConfigError(f'{where}: has no "prompt" (it has: {", ".join(row) or "nothing"}); add it')
    prompt = row["prompt"]
    if isinstance(prompt, list):
        fine = all(isinstance(message, dict) and {"role", "content"} <= message.keys() for message in prompt)
    else:
        fine = isinstance(prompt, str)
    if not fine:
        raise ConfigError(f'{where}: "prompt" must be a string, or a list of messages with "role" and "content"')
    if not prompt:
        raise ConfigError(f'{where}: "prompt" is empty; write one or remove the row')


def _tokenize(
    rows: Sequence[Row], tokenizer: PreTrainedTokenizerBase, chat_template: bool, today: date
) -> list[list[int]]:
    for index, row in enumerate(rows):
        _check_row(row, f"data: row {index}")
        if isinstance(row["prompt"], list) and not chat_template:
            raise ConfigError(f"data: row {index} is a list of chat messages; set data.chat_template=true")
    if chat_template and not tokenizer.chat_template:
        raise ConfigError(
            "data.chat_template = true: this model's tokenizer has no chat template; set data.chat_template=false"
        )
    if chat_template:
        check_template(tokenizer)
    texts = [render(row["prompt"], tokenizer, chat_template, today) for row in rows]
    if chat_template:  # without one a prompt is the whole text, and its control tokens are meant
        faults = faults_of([row["prompt"] for row in rows], texts, tokenizer)
        for index, fault in enumerate(faults):
            if fault:
                raise ConfigError(f"data: row {index}: {fault}")
    return encode(texts, tokenizer, chat_template)


def encode(texts: list[str], tokenizer: PreTrainedTokenizerBase, chat_template: bool) -> list[list[int]]:
    """The ids of rendered prompts. A template writes the special tokens itself: the tokenizer must not add its own."""
    return tokenizer(texts, add_special_tokens=not chat_template)["input_ids"]


def _check_lengths(ids: Sequence[Sequence[int]], limit: int | None) -> None:
    empty = [index for index, tokens in enumerate(ids) if not tokens]
    if empty:
        raise ConfigError(f"data: {len(empty)} prompts have no tokens, the first is row {empty[0]}; remove them")
    if limit is None:
        return
    long = [index for index, tokens in enumerate(ids) if len(tokens) > limit]
    if long:
        raise ConfigError(
            f"data.max_prompt_tokens = {limit}: {len(long)} of {len(ids)} prompts are longer, the first is row "
            f"{long[0]} with {len(ids[long[0]])} tokens; raise it to {max(map(len, ids))} or filter them out"
        )
