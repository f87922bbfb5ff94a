"""From a row's prompt to the text that is tokenised, and what a chat template or a problem's text may do to it."""

from __future__ import annotations

import re
from datetime import date, datetime, time
from typing import TYPE_CHECKING, Any

from flowrl_mega.config import ConfigError, DataSettings

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

# Templates that write today's date (Llama 3.1's does) would make other prompts of the same rows every day. They are
# given this one, which Llama 3.1's own falls back to, or data.template_date.
TEMPLATE_DATE = DataSettings().template_date
NOW = re.compile(r"""strftime_now\(\s*(?:format\s*=\s*)?(["'])(.*?)\1\s*\)""")
ASKED = re.compile(r"strftime_now(?!\s+is\s)")  # not whether there is such a function
MARK = "the-answer-begins-here"


def render(
    prompt: str | list[dict[str, str]],
    tokenizer: PreTrainedTokenizerBase,
    chat_template: bool,
    today: date = TEMPLATE_DATE,
) -> str:
    """The text that is tokenised: the prompt, or with `chat_template` what the template makes of its messages.

    `today` is the date in it, where the template asks for one.
    """
    if not chat_template:
        assert isinstance(prompt, str)
        return prompt
    return _apply(tokenizer, as_messages(prompt), add_generation_prompt=True, today=today)


def as_messages(prompt: str | list[dict[str, str]]) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def fault(prompt: str | list[dict[str, str]], text: str, control: list[str]) -> str | None:
    """What is wrong with a prompt that was rendered as `text`, or None.

    `control`: the tokens of `control_tokens`. One in a problem's text would be read as the token: it could end the
    user's turn and begin the assistant's, answer and all.
    """
    messages = [message for message in as_messages(prompt) if isinstance(message["content"], str)]
    for token in control:
        if any(token in message["content"] for message in messages):
            return f"holds the control token {token!r}; write it in another way, or remove the row"
    plain = " ".join(text.split())
    for message in messages:
        if message["role"] == "user" and " ".join(message["content"].split()) not in plain:
            return "the chat template leaves out what the user says"
    return None


def control_tokens(tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """The texts that the tokenizer reads as special tokens, longest first."""
    added = [token.content for token in tokenizer.added_tokens_decoder.values() if token.special]
    return sorted({token for token in [*added, *tokenizer.all_special_tokens] if token.strip()}, key=len, reverse=True)


def check_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError for a template with which prompts would not be what they seem.

    They would end before the assistant's turn begins: it ignores add_generation_prompt and writes a header before what
    the assistant says. Or they would be others every day: it asks for the date in a way that cannot be fixed.
    """
    if ASKED.search(_dated(tokenizer, TEMPLATE_DATE)):
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} writes today's date in a format that is no text of its "
            'own, so every day would have other prompts; write strftime_now("%d %b %Y") or a date into its '
            "chat_template"
        )
    user = [{"role": "user", "content": "2+2?"}]
    try:
        prompt = _apply(tokenizer, user, add_generation_prompt=True)
        said = _apply(tokenizer, [*user, {"role": "assistant", "content": MARK}], add_generation_prompt=False)
        ignored = prompt == _apply(tokenizer, user, add_generation_prompt=False)
    except Exception:  # a template for other roles or kinds of messages, which its own rows will try
        return
    header = said.removeprefix(prompt).partition(MARK)[0] if said.startswith(prompt) else ""
    if ignored and header.strip():
        raise ConfigError(
            f"the chat template of {tokenizer.name_or_path!r} ignores add_generation_prompt: prompts would end before "
            f"{header.strip()!r}, which begins the assistant's turn; correct its chat_template"
        )


def writes_the_date(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether its chat template asks for today's date."""
    return NOW.search(tokenizer.get_chat_template()) is not None


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: list[dict[str, str]],
    add_generation_prompt: bool,
    today: date = TEMPLATE_DATE,
) -> str:
    text = tokenizer.apply_chat_template(
        messages,
        tokenize=False,
        add_generation_prompt=add_generation_prompt,
        chat_template=_dated(tokenizer, today),
    )
    assert isinstance(text, str)
    return text


def _dated(tokenizer: PreTrainedTokenizerBase, today: date) -> str:
    """The chat template, with `today` where it asks for the date; transformers hands no function on to templates."""
    midnight = datetime.combine(today, time())
    return NOW.sub(lambda match: repr(midnight.strftime(match[2])), tokenizer.get_chat_template())


def faults_of(prompts: list[Any], texts: list[str], tokenizer: PreTrainedTokenizerBase) -> list[str | None]:
    control = control_tokens(tokenizer)
    return [fault(prompt, text, control) for prompt, text in zip(prompts, texts, strict=True)]
