"""Prompts: what is read, what is refused, and in which order prompts are served."""

import json

import pytest

from flowrl_mega.config import ConfigError
from flowrl_mega.data.loader import MmapLoader
from flowrl_mega.data.prompts import read_jsonl, tokenized
from flowrl_mega.data.tokenizer import char_tokenizer

TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return char_tokenizer("0123456789:<>abcdefghijklmnopqrstuvwxyz ")


def numbered(count):
    return [{"prompt": f"{n:03d}:", "answer": n} for n in range(count)]


def test_each_epoch_serves_every_prompt_once(tokenizer):
    """The stream is a sequence of permutations: nothing repeats or is lost within an epoch, and epochs differ."""
    loader = MmapLoader(tokenized(numbered(50), tokenizer), seed=3)
    epochs = [[p.index for p in loader.next(50)] for _ in range(3)]
    assert all(sorted(epoch) == list(range(50)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert epochs[0] != list(range(50))


def test_a_resumed_stream_equals_an_uninterrupted_one(tokenizer):
    """Only the position is saved in a checkpoint: any cut into calls, on a new store, must give the same stream."""

    def loader(seed=5):
        return MmapLoader(tokenized(numbered(7), tokenizer), seed)

    whole = [p.index for p in loader().next(40)]
    parts: list[int] = []
    state = loader().state_dict()
    for size in (1, 6, 10, 3, 20):
        resumed = loader()
        resumed.load_state_dict(state)
        parts += [p.index for p in resumed.next(size)]
        state = resumed.state_dict()
    assert parts == whole
    assert whole != [p.index for p in loader(seed=6).next(40)]


def test_the_order_never_changes_between_versions(tokenizer):
    """A fixed seed gives a recorded order: a change would silently break the resume of older checkpoints."""
    loader = MmapLoader(tokenized(numbered(8), tokenizer), seed=0)
    assert [p.index for p in loader.next(16)] == [3, 2, 1, 6, 0, 7, 4, 5, 7, 4, 5, 1, 6, 2, 0, 3]


def test_prompts_carry_their_ids_and_their_row(tokenizer):
    """The reward gets the row as it was, extra keys and all; the ids are the tokenizer's."""
    row = {"prompt": "012:", "answer": 12, "source": {"book": "x"}}
    (prompt,) = tokenized([row], tokenizer)
    assert prompt.row == row
    assert prompt.token_ids == [2, 3, 4, 12]  # <pad> and <eos> come first


def test_chat_template_wraps_strings_and_takes_messages(tokenizer):
    """A string and the same text as one user message must reach the model identically, with the generation prompt."""
    tokenizer.chat_template = TEMPLATE
    rows = [
        {"prompt": "hi"},
        {"prompt": [{"role": "user", "content": "hi"}]},
        {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]},
    ]
    texts = [tokenizer.decode(p.token_ids) for p in tokenized(rows, tokenizer, chat_template=True)]
    assert texts == ["<user>hi<assistant>", "<user>hi<assistant>", "<system>be<user>hi<assistant>"]
    with pytest.raises(ConfigError, match=r"row 1 is a list of chat messages; set data.chat_template=true"):
        tokenized(rows, tokenizer, chat_template=False)


def test_chat_template_needs_one(tokenizer):
    """A base model's tokenizer has no template: that is a setting to correct, not a traceback."""
    with pytest.raises(ConfigError, match=r"data.chat_template = true: .*no chat template"):
        tokenized([{"prompt": "hi"}], tokenizer, chat_template=True)


def test_long_prompts_are_refused(tokenizer):
    """Cutting a prompt would change the task silently, so the message says how many are too long and which is first."""
    rows = [{"prompt": "a" * n} for n in (3, 6, 5, 9)]
    assert len(tokenized(rows, tokenizer, max_prompt_tokens=9)) == 4
    with pytest.raises(ConfigError, match=r"max_prompt_tokens = 5: 2 of 4 .* row 1 with 6 tokens; raise it to 9"):
        tokenized(rows, tokenizer, max_prompt_tokens=5)


def test_jsonl_reads_what_json_writes(tokenizer, tmp_path):
    """Separators that Unicode calls line ends, a byte order mark and blank lines occur in real files."""
    rows = [{"prompt": "one\u2028two\x85three", "k": 1}, {"prompt": [{"role": "user", "content": "x"}]}]
    path = tmp_path / "rows.jsonl"
    path.write_text("\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8-sig")
    assert read_jsonl(path) == rows


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}\n{"prompt": \n', r"line 2: not valid JSON"),
        ('\n{"question": "a"}\n', r'line 2: has no "prompt" \(it has: question\)'),
        ('{"prompt": 3}\n', r'line 1: "prompt" must be a string'),
        ('{"prompt": [{"role": "user"}]}\n', r'line 1: "prompt" must be .* messages with "role" and "content"'),
        ('{"prompt": ""}\n', r'line 1: "prompt" is empty'),
        ("[1]\n", r"line 1: is a list; must be an object"),
        ("\n", r"holds no rows"),
    ],
)
def test_bad_jsonl_names_file_line_and_fix(tmp_path, content, message):
    """Each mistake in a user's file is found before training and located."""
    path = tmp_path / "bad.jsonl"
    path.write_text(content)
    with pytest.raises(ConfigError, match=message) as caught:
        read_jsonl(path)
    assert str(path) in str(caught.value)


def test_missing_or_binary_file(tmp_path):
    """No file, a folder and a file that is not text give one message each."""
    (tmp_path / "binary.jsonl").write_bytes(b"\xff\xfe\x00")
    for name in ("none.jsonl", "", "binary.jsonl"):
        with pytest.raises(ConfigError, match="cannot be read"):
            read_jsonl(tmp_path / name)
