"""Do prompts fit the model: its vocabulary, and the positions that it was made for?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.data.load_prompts import PromptData
from flowrl_mega.data.loader import whole
from flowrl_mega.data.prompts import Prompts
from flowrl_mega.data.stop_ids import check_stop_ids
from flowrl_mega.data.store import MappedStore
from flowrl_mega.json_file import read_object

CURE = (
    "give the model rows for all tokens (resize_token_embeddings of transformers), or take the tokenizer that it was "
    "trained with"
)


def model_vocabulary(path: str | Path) -> int | None:
    """vocab_size in the config.json of a model folder; None where there is none, as beside a mere tokenizer."""
    size = read_object(Path(path) / "config.json").get("vocab_size")
    return size if type(size) is int else None


def beyond(ids: list[int], vocab: int, tokenizer: Any) -> str | None:
    """What is wrong with a prompt that holds a token which the model has no row for; None if nothing is."""
    wrong = next((i for i in ids if i >= vocab), None)
    if wrong is None:
        return None
    token = tokenizer.convert_ids_to_tokens(wrong)
    return f"holds token id {wrong} ({token!r}), outside the model's vocabulary of {vocab}"


def check_prompts(data: PromptData, config: Config, vocab: int, positions: int) -> None:
    """Refuse prompts with tokens that the model has not, or without room for an answer, and an end that it cannot say.

    How much servers take they know themselves.
    """
    check_stop_ids(data.stop_ids, vocab, config.model.path)
    for setting, prompts in (("data", data.prompts), ("data.held_out", data.held_out)):
        if prompts is not None:
            check_vocabulary(setting, prompts, vocab, data.tokenizer)
            if config.rollout.engine == "embedded":
                check_positions(setting, prompts, positions, config.rollout.max_tokens)


def check_vocabulary(setting: str, prompts: Prompts, vocab: int, tokenizer: Any) -> None:
    """Refuse prompts with tokens that the model has no row for, added to the tokenizer alone; names the first row."""
    if max(tokenizer.get_vocab().values()) < vocab:
        return  # then none can be: a store is not read
    data = whole(prompts)
    if isinstance(data, MappedStore):
        first = data.first_beyond(vocab)
        found = [] if first is None else [(first, data.tokens(first).tolist())]
    else:
        found = [(prompt.index, prompt.token_ids) for prompt in prompts if max(prompt.token_ids) >= vocab][:1]
    for index, ids in found:
        raise ConfigError(f"{setting}: row {index} {beyond(ids, vocab, tokenizer)}; {CURE}")


def check_positions(setting: str, prompts: Prompts, positions: int, max_tokens: int) -> None:
    """Refuse prompts that, with an answer, are longer than the model's positions; names the longest one."""
    index, length = _longest(prompts)
    if length + max_tokens > positions:
        raise ConfigError(
            f"rollout.max_tokens = {max_tokens}: {length + max_tokens} with the {length} tokens of {setting}, row "
            f"{index}, but the model's max_position_embeddings is {positions}; lower rollout.max_tokens to "
            f"{positions - length}, or leave long prompts out (data.max_prompt_tokens says which)"
            if length < positions
            else f"{setting}: row {index} has {length} tokens, and the model's max_position_embeddings is {positions}; "
            "leave it out, or take a model with more positions"
        )


def _longest(prompts: Prompts) -> tuple[int, int]:
    """(row, number of tokens) of the longest prompt; of a store that of all its prompts."""
    data = whole(prompts)
    if isinstance(data, MappedStore):
        lengths = data.lengths()
        return int(np.argmax(lengths)), int(lengths.max())
    longest = max(prompts, key=lambda prompt: len(prompt.token_ids))
    return longest.index, len(longest.token_ids)
