"""From the data settings to prompts: rows of a file or a task, tokenized with the model's own tokenizer."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from transformers import AutoTokenizer

from flowrl_mega.config import Config, ConfigError, DataSettings
from flowrl_mega.data.loader import whole
from flowrl_mega.data.modules import modules_of_tests
from flowrl_mega.data.prompts import Prompts, read_jsonl, tokenized
from flowrl_mega.data.split import split
from flowrl_mega.data.stop_ids import stop_ids
from flowrl_mega.data.store import MappedStore, open_store
from flowrl_mega.data.task import task_rows


class PromptData(NamedTuple):
    """What `data` and the model's tokenizer come to."""

    prompts: Prompts  # to train on
    held_out: Prompts | None
    tokenizer: Any
    stop_ids: tuple[int, ...]  # token ids that end an answer


def load_prompts(config: Config) -> PromptData:
    """The prompts that the `data` section names, tokenized. Raises ConfigError where they cannot be read."""
    data, tokenizer = config.data, load_tokenizer(config.model.path)
    held_out: Prompts | None = None
    if data.task is not None:
        rows = task_rows(data.task, data.task_args)
        prompts: Prompts = tokenized(rows, tokenizer, data.chat_template, data.max_prompt_tokens, data.template_date)
    else:
        assert data.path is not None, "the settings have exactly one of the two"
        prompts = _read(data.path, data, tokenizer)
    if isinstance(data.held_out, str):
        held_out = _read(data.held_out, data, tokenizer)
    elif data.held_out is not None:
        prompts, held_out = split(prompts, data.held_out, config.seed)
    ends = stop_ids(config.model.path, tokenizer, needed=not config.rollout.ignore_eos)
    return PromptData(prompts, held_out, tokenizer, ends)


def _read(path: str, data: DataSettings, tokenizer: Any) -> Prompts:
    """The prompts of a store, or of a JSON lines file."""
    if Path(path).is_dir():
        return open_store(path, tokenizer, data.max_prompt_tokens, data.chat_template, data.template_date)
    return tokenized(read_jsonl(path), tokenizer, data.chat_template, data.max_prompt_tokens, data.template_date)


def kinds_of(prompts: Prompts) -> set[str]:
    """The "kind" of every row, which says what grades it; "" for rows without one. A store's header knows them."""
    store = whole(prompts)
    if isinstance(store, MappedStore):
        return set(store.header["kinds"])
    return {str(prompt.row.get("kind", "")) for prompt in prompts}


def modules_of(prompts: Prompts) -> set[str]:
    """The modules that the tests of the rows import. A store's header knows them, unless an earlier version made it."""
    store = whole(prompts)
    if isinstance(store, MappedStore) and "modules" in store.header:
        return set(store.header["modules"])
    return {name for prompt in prompts for name in modules_of_tests(prompt.row)}


def load_tokenizer(path: str) -> Any:
    try:
        return AutoTokenizer.from_pretrained(path)
    except Exception as error:  # transformers checks config.json's values, each in its own way
        first_line = str(error).strip().split("\n")[0]
        raise ConfigError(f"model.path = {path!r}: its tokenizer cannot be loaded ({first_line})") from None
