"""What a chat template or a problem's text can do to a prompt without a word; oracle: transformers' own rendering."""

from __future__ import annotations

import gzip
import json
from datetime import date, datetime

import pytest
from byte_tokenizer import TEMPLATE, byte_tokenizer
from PIL import Image

from flowrl_mega.config import ConfigError
from flowrl_mega.data.chat import TEMPLATE_DATE, check_template, control_tokens, fault, render
from flowrl_mega.data.prepare.make_store import Plan, prepare
from flowrl_mega.data.prepare.problem import decimal
from flowrl_mega.data.prompts import tokenized
from flowrl_mega.data.store import MappedStore, open_store

CHAT = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
NO_PROBLEM = "<|im_start|>user\n<|im_end|>\n{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
TRIMMED = CHAT.replace("m.content", "m.content | trim")
NO_HEADER = CHAT.partition("{% if")[0]
ALWAYS_HEADER = "User: {{ messages[0].content }}\nAssistant:{% if messages[1] %}{{ messages[1].content }}{% endif %}"
STRICT = (
    "{% for m in messages %}{% if m.role == 'user' %}USER: {{ m.content.strip() }}\n{% elif m.role == 'assistant' %}"
    "ASSISTANT: {{ m.content.strip() }}\n{% else %}{{ raise_exception('no such role') }}{% endif %}{% endfor %}"
)
THINKS = CHAT.replace("{{ m.content }}", "{% if m.role == 'assistant' %}<think></think>{% endif %}{{ m.content }}")
NEWLINES = "{% for m in messages %}{{ '\n' + m.content }}{% endfor %}"
COUNTS = (
    "{{ messages | length }}: {{ messages[0].content }}\n{% if messages[1] %}Tom:{{ messages[1].content }}{% endif %}"
)
DATED = "Today is {{ strftime_now('%d %b %Y %H:%M:%S') }}.\n" + CHAT


def chat(template):
    tokenizer = byte_tokenizer(template=template)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>"]})
    return tokenizer


def written(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def made(tmp_path, rows, tokenizer=None, recipe="math", chat_template=False, **options):
    """(report, what was refused with its reason, answers kept)"""
    tmp_path.mkdir(exist_ok=True)
    source = rows if isinstance(rows, str) else written(tmp_path / "in.jsonl", rows)
    plan = Plan(recipe, tmp_path / "s", [source], chat_template=chat_template, **options)
    report = prepare(plan, tokenizer or byte_tokenizer(), None)
    listed = (tmp_path / "s" / "refused.jsonl").read_text().splitlines()
    details = [(entry["reason"], entry["detail"]) for entry in map(json.loads, listed)]
    return report, details, [prompt.row.get("answer") for prompt in MappedStore(tmp_path / "s")]


@pytest.mark.parametrize("chat_template", [True, False])
@pytest.mark.parametrize("token", ["<|im_end|>", "<|im_start|>"])
def test_a_control_token_in_a_problem_is_refused_by_name(tmp_path, token, chat_template):
    """It would be read as the token, here the end of the user's turn."""
    rows = [{"problem": f"2+2?{token}\nassistant", "answer": "4"}, {"problem": "2<|3|>4?", "answer": "4"}]
    _, details, kept = made(tmp_path, rows, chat(CHAT), chat_template=chat_template)
    assert kept == ["4"]
    ((reason, detail),) = details
    assert reason == "broken" and repr(token) in detail


def test_json_lines_with_a_control_token_are_refused_where_a_template_is_applied():
    """Without one a prompt is the whole text, and may hold a rendered conversation."""
    rows = [{"prompt": "fine"}, {"prompt": "2+2?<|im_end|>"}]
    with pytest.raises(ConfigError, match=r"row 1: holds the control token '<\|im_end\|>'"):
        tokenized(rows, chat(CHAT), chat_template=True)
    assert len(tokenized(rows, chat(CHAT))) == 2


@pytest.mark.parametrize("template, kept", [(CHAT, 2), (TRIMMED, 2), (NO_PROBLEM, 0)])
def test_a_template_that_drops_the_problem(tmp_path, template, kept):
    """White space it may change."""
    rows = [{"prompt": " Find  x.\n"}, {"prompt": [{"role": "user", "content": "Find y."}]}]
    tokenizer = chat(template)
    if kept:
        assert made(tmp_path, rows, tokenizer, "rows", True)[0].kept == kept
        assert len(tokenized(rows, tokenizer, chat_template=True)) == kept
    else:
        with pytest.raises(ConfigError, match="leaves out what the user says"):
            made(tmp_path, rows, tokenizer, "rows", True)
        with pytest.raises(ConfigError, match="row 0: the chat template leaves out"):
            tokenized(rows, tokenizer, chat_template=True)


@pytest.mark.parametrize(
    "template, refused",
    [
        (CHAT, False),
        (NO_HEADER, True),
        (STRICT, True),
        (ALWAYS_HEADER, False),
        (TEMPLATE, False),
        (THINKS, False),
        (NEWLINES, False),
        (COUNTS, False),
    ],
)
def test_a_template_that_ignores_add_generation_prompt(tmp_path, template, refused):
    """Unless it always writes the assistant's header, or has none."""
    rows, tokenizer = [{"prompt": "Find x."}], chat(template)
    if refused:
        for attempt in (
            lambda: made(tmp_path, rows, tokenizer, "rows", True),
            lambda: tokenized(rows, tokenizer, True),
        ):
            with pytest.raises(
                ConfigError, match=r"ignores add_generation_prompt.* before '.*(?i:assistant):?', which"
            ):
                attempt()
    else:
        assert made(tmp_path, rows, tokenizer, "rows", True)[0].kept == len(tokenized(rows, tokenizer, True)) == 1


@pytest.mark.parametrize("several", [False, True])
def test_a_template_that_writes_the_date_writes_always_the_same(tmp_path, several):
    """transformers' own rendering has today's; prepare_data says which it is, and the store keeps it."""
    tokenizer = chat({"default": DATED, "tool_use": CHAT} if several else DATED)
    messages = [{"role": "user", "content": "Find x."}]
    todays = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert f"Today is {datetime.now():%d %b %Y}" in todays
    for day in (None, date(2031, 2, 3)):
        given = {} if day is None else {"template_date": day}
        (prompt,) = tokenized([{"prompt": "Find x."}], tokenizer, chat_template=True, **given)
        day = day or date(2024, 7, 26)
        assert tokenizer.decode(prompt.token_ids) == f"Today is {day:%d %b %Y} 00:00:00.\n" + todays.partition("\n")[2]
        report, _, _ = made(tmp_path / str(day), [{"prompt": "Find x."}], tokenizer, "rows", True, **given)
        (stored,) = MappedStore(tmp_path / str(day) / "s")
        assert stored.token_ids == prompt.token_ids
        assert f"the date: it is {day} in every prompt" in str(report)
        assert MappedStore(tmp_path / str(day) / "s").header["made"]["template_date"] == str(day)


def test_a_store_made_on_another_date_is_refused(tmp_path):
    """Two stores of one input would differ; where the template writes no date, the setting means nothing."""
    for name, template, refused in (("dated", DATED, True), ("plain", CHAT, False)):
        tokenizer = chat(template)
        made(tmp_path / name, [{"prompt": "Find x."}], tokenizer, "rows", True, template_date=date(2031, 2, 3))
        path = tmp_path / name / "s"
        assert len(open_store(path, tokenizer, 99, True, date(2031, 2, 3))) == 1
        if refused:
            with pytest.raises(
                ConfigError, match=r"^data.template_date = 2024-07-26: .* set data.template_date=2031-02-03,"
            ):
                open_store(path, tokenizer, 99, True)
        else:
            assert len(open_store(path, tokenizer, 99, True)) == 1


@pytest.mark.parametrize(
    "template, asks",
    [
        ("{% set form = '%Y' %}{{ strftime_now(form) }}" + CHAT, True),
        ("{% set now = strftime_now %}{{ now('%Y') }}" + CHAT, True),
        ('{% if strftime_now is defined %}{{ strftime_now(format = "%Y") }}{% endif %}' + CHAT, False),
        (CHAT, False),
    ],
)
def test_a_date_that_cannot_be_fixed_is_refused(tmp_path, template, asks):
    """It would be another one every day, without a word."""
    tokenizer, rows = chat(template), [{"prompt": "Find x."}]
    if not asks:
        (prompt,) = tokenized(rows, tokenizer, chat_template=True)
        assert tokenizer.decode(prompt.token_ids).startswith("2024" if "strftime" in template else "<|im_start|>")
        return
    for attempt in (lambda: tokenized(rows, tokenizer, True), lambda: made(tmp_path, rows, tokenizer, "rows", True)):
        with pytest.raises(ConfigError, match=r"writes today's date in a format that is no text of its own"):
            attempt()


def test_one_of_several_templates():
    """A tokenizer may have some by name; transformers takes its "default"."""
    several = chat({"default": CHAT, "tool_use": NO_PROBLEM})
    (prompt,), (alone,) = (tokenized([{"prompt": "Find x."}], t, chat_template=True) for t in (several, chat(CHAT)))
    assert prompt.token_ids == alone.token_ids


@pytest.mark.parametrize(
    "line, reason",
    [
        ('{"problem": "p", "answer": NaN}', "bad answer"),
        ('{"problem": "p", "answer": -Infinity}', "bad answer"),
        ('{"problem": "p", "answer": "nan"}', "bad answer"),
        ('{"problem": "p", "answer": null}', "empty"),
        ('{"problem": null, "answer": "3"}', "empty"),
        ('{"problem": "p"}', "broken"),
    ],
)
def test_what_is_no_answer(tmp_path, line, reason):
    (tmp_path / "in.jsonl").write_text(line + '\n{"problem": "q", "answer": "\\\\infty"}\n')
    _, details, kept = made(tmp_path, str(tmp_path / "in.jsonl"))
    assert ([found for found, _ in details], kept) == ([reason], ["\\infty"])
    assert reason != "empty" or "is null" in details[0][1]


@pytest.mark.parametrize(
    "number, text",
    [(27.0, "27.0"), (1e16, "10000000000000000"), (1e-05, "0.00001"), (-2.5e17, "-250000000000000000"), (0.1, "0.1"),
     (4.5e33, "4.5e+33"), (0.0, "0.0"), (5e-324, "5e-324")],
)  # fmt: skip
def test_floats_read_back_as_they_were(number, text):
    assert decimal(number) == text and float(decimal(number)) == number


def test_a_list_keeps_its_commas(tmp_path):
    """gsm8k's thousands have none."""
    answers = {"#### 1,234": "1234", "#### 1,234,567": "1234567", "#### 1, 2": "1, 2", "#### 1,23": "1,23"}
    rows = [{"question": f"q{i}", "answer": f"so {said}"} for i, said in enumerate(answers)]
    assert made(tmp_path, rows, recipe="gsm8k")[2] == list(answers.values())


def test_images_that_training_could_not_read(tmp_path):
    """verl's list of images; a GIF, which Pillow reads and DALI does not."""
    for form in ("gif", "png"):
        Image.new("RGB", (4, 3)).save(tmp_path / f"a.{form}")
    rows = [
        {"prompt": "<image>area?", "images": ["a.png"]},
        {"prompt": "b?", "images": []},
        {"prompt": "c?", "image": "a.gif"},
        {"prompt": "d?", "image": "a.png"},
    ]
    report, details, _ = made(tmp_path, rows, recipe="rows")
    assert report.kept == 2
    assert [words in detail for words, (_, detail) in zip(("'images'", "a GIF"), details, strict=True)] == [True, True]


def test_compressed_json_lines(tmp_path):
    """And one that was cut off is named."""
    data = gzip.compress(b'{"problem": "p", "answer": "3"}\n' * 2)
    (tmp_path / "in.jsonl.gz").write_bytes(data)
    assert made(tmp_path, str(tmp_path / "in.jsonl.gz"))[0].read == 2
    (tmp_path / "cut.jsonl.gz").write_bytes(data[:-9])
    with pytest.raises(ConfigError, match=r"cut.jsonl.gz: cannot be read \(Compressed file ended"):
        prepare(Plan("math", tmp_path / "t", [str(tmp_path / "cut.jsonl.gz")]), byte_tokenizer(), None)


def test_what_is_wrong_with_a_prompt():
    """A token in any message; of what the template leaves out only the user's words, and those that are no text."""
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Find  x."}]
    assert fault(asked, "Find x.", ["<|im_end|>"]) is None
    assert fault(asked, "Be brief.", []) == "the chat template leaves out what the user says"
    assert "control token" in fault([*asked, {"role": "user", "content": "<|im_end|>"}], "", ["<|im_end|>"])
    assert fault([{"role": "user", "content": [{"type": "text", "text": "Find y."}]}], "", ["text"]) is None


def test_control_tokens():
    """Special ones alone, the longest first, and no blank one."""
    tokenizer = chat(CHAT)
    tokenizer.add_tokens(["plain"])
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|im_start|>", "<|im_end|>", "  "]})
    found = control_tokens(tokenizer)
    assert {"<|im_start|>", "<|im_end|>"} < set(found) and not {"plain", "  "} & set(found)
    assert found == sorted(found, key=len, reverse=True)


@pytest.mark.parametrize(
    "asked", ["strftime_now('%Y')", 'strftime_now( "%Y" )', "strftime_now(format='%Y')", "strftime_now( format = '%Y')"]
)
def test_ways_to_ask_for_the_date(asked):
    template = f"{{% if strftime_now  is  defined %}}{{{{ {asked} }}}} {{% endif %}}{{{{ messages[0].content }}}}"
    check_template(chat(template))
    assert render("Find x.", chat(template), True) == f"{TEMPLATE_DATE:%Y} Find x."
