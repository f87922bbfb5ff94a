"""The prompt store gives back what was written, and refuses the rest. Oracles: the tokenizer, JSON, numpy."""

import io
import json
import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace

import numpy as np
import pytest
from byte_tokenizer import TEMPLATE, byte_tokenizer
from PIL import Image

from flowrl_mega.config import ConfigError
from flowrl_mega.data.fingerprint import Fingerprint
from flowrl_mega.data.loader import MmapLoader
from flowrl_mega.data.store import MappedStore, new_store, open_store

TEXTS = ["2+2=", "Ünïcödé \u2028 日本語 🙂", "a", "tab\t\nline\r\n \x00 nul", "long " * 50]
ROWS = [
    {"prompt": text, "task": "ab"[i % 2], "answer": text[::-1], "more": {"pi": 3.25, "big": 10**30, "none": None}}
    for i, text in enumerate(TEXTS)
]


@pytest.fixture
def store(tmp_path, tokenizer):
    with new_store(tmp_path / "store", tokenizer, made={"recipe": "test"}) as writer:
        for row in ROWS:
            writer.add(tokenizer(row["prompt"])["input_ids"], row)
    return tmp_path / "store"


def test_it_gives_back_what_was_written(store, tokenizer):
    """Ids, rows and their order, to the bit; by index from both ends, by slice, and as arrays."""
    found = MappedStore(store)
    assert len(found) == len(TEXTS)
    assert [p.row for p in found] == ROWS
    assert [p.token_ids for p in found] == [tokenizer(text)["input_ids"] for text in TEXTS]
    assert all(type(i) is int for p in found for i in p.token_ids)
    assert [tokenizer.decode(found.tokens(i)) for i in range(5)] == TEXTS
    assert found.tokens(1).dtype == np.uint16 and not found.tokens(1).flags.writeable
    assert [p.index for p in found[1::2]] == [1, 3]
    assert found[-1].row == ROWS[-1] and found[0].image is None
    assert found.lengths().tolist() == [len(tokenizer(text)["input_ids"]) for text in TEXTS]
    with pytest.raises(IndexError):
        found[5]


def test_its_files_can_be_read_without_us(store, tokenizer):
    """The format is what the documentation says: JSON, a plain array, numpy's own files."""
    header = json.loads((store / "store.json").read_text())
    ids = [tokenizer(text)["input_ids"] for text in TEXTS]
    assert header["count"] == 5 and header["tokens"] == sum(map(len, ids)) and header["longest"] == max(map(len, ids))
    assert header["tasks"] == {"a": 3, "b": 2} and header["made"] == {"recipe": "test"}
    assert np.fromfile(store / "tokens.bin", header["dtype"]).tolist() == sum(ids, [])
    assert np.load(store / "token_ends.npy").tolist() == np.cumsum([len(i) for i in ids]).tolist()
    assert [json.loads(line) for line in (store / "rows.jsonl").read_bytes().split(b"\n")[:-1]] == ROWS
    assert np.load(store / "row_ends.npy")[-1] == (store / "rows.jsonl").stat().st_size


def test_a_row_is_decoded_only_when_asked_for(store, monkeypatch):
    """Loaders pass prompts on by the thousand; decoding rows that nobody reads would be most of their work."""
    found = MappedStore(store)
    decoded = []
    monkeypatch.setattr("flowrl_mega.data.store.json.loads", lambda text: decoded.append(text) or {})
    prompts = [prompt for prompt in found]
    assert decoded == []
    assert prompts[2].row is prompts[2].row
    assert len(decoded) == 1


@pytest.mark.slow
def test_large_vocabularies_have_wider_ids(tmp_path):
    """Qwen's vocabulary is beyond 65,536: two bytes would cut its ids."""
    for more, dtype in ((65_536 - 257, np.uint16), (65_537 - 257, np.uint32), (151_000, np.uint32)):
        large = byte_tokenizer(more)
        with new_store(tmp_path / str(more), large) as writer:
            writer.add([0, len(large) - 1, 5], {"prompt": "x"})
        found = open_store(tmp_path / str(more), large, 3, False)
        assert found.tokens(0).dtype == dtype
        assert found[0].token_ids == [0, len(large) - 1, 5]


def test_images(tmp_path, tokenizer):
    """A PNG comes back as the pixels that went in, a JPEG as Pillow decodes it, and none as none."""
    pixels = np.arange(5 * 7 * 3, dtype=np.uint8).reshape(5, 7, 3)
    encoded = {}
    for kind in ("PNG", "JPEG"):
        Image.fromarray(pixels).save(buffer := io.BytesIO(), kind)
        encoded[kind] = buffer.getvalue()
    with new_store(tmp_path / "s", tokenizer) as writer:
        for image in (encoded["PNG"], b"", encoded["JPEG"], b"no image"):
            writer.add([1], {"prompt": "what is this?"}, image)
    found = MappedStore(tmp_path / "s")
    assert found.has_images and np.array_equal(found[0].image, pixels) and found[1].image is None
    assert np.array_equal(found[2].image, np.asarray(Image.open(io.BytesIO(encoded["JPEG"]))))
    assert found.image_bytes(2) == encoded["JPEG"]
    with pytest.raises(ConfigError, match="image of row 3 cannot be decoded"):
        found[3]


def _first_and_last(store, answers):
    answers.put([(p.token_ids, p.row) for p in (store[0], store[len(store) - 1])])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_other_processes_open_it(store, method):
    """Loaders' workers get it forked or pickled: the pickle is its path and no copy of the data."""
    found = MappedStore(store)
    assert len(pickle.dumps(found)) < 500
    context = multiprocessing.get_context(method)
    answers = context.Queue()
    process = context.Process(target=_first_and_last, args=(found, answers))
    process.start()
    assert answers.get(timeout=60) == [(p.token_ids, p.row) for p in (found[0], found[4])]
    process.join()
    prompt = pickle.loads(pickle.dumps(found[3]))
    assert (prompt.token_ids, prompt.row) == (found[3].token_ids, ROWS[3])


def test_the_loader_reads_it_as_it_reads_a_list(store):
    """The same order for the same seed, wherever the prompts lie."""
    found = MappedStore(store)
    from_store, from_list = (MmapLoader(prompts, 3).next(12) for prompts in (found, list(found)))
    assert [p.row for p in from_store] == [p.row for p in from_list]


def _cut(path, name):
    data = (path / name).read_bytes()
    (path / name).write_bytes(data[: len(data) - 2])


@pytest.mark.parametrize("name", ["tokens.bin", "token_ends.npy", "rows.jsonl", "row_ends.npy"])
def test_truncated_and_missing_files(store, name):
    """A copy that broke off must not train on what is left."""
    _cut(store, name)
    with pytest.raises(ConfigError, match=rf"{name} has \d+ bytes, and \d+ were written; make it again"):
        MappedStore(store)
    (store / name).unlink()
    with pytest.raises(ConfigError, match=f"{name} is missing"):
        MappedStore(store)


def test_damage_of_the_same_length(store):
    """Lengths do not show it: `verify` does, and a row that is no JSON any more is named by its reader too."""
    rows = bytearray((store / "rows.jsonl").read_bytes())
    rows[0:1] = b"x"
    (store / "rows.jsonl").write_bytes(rows)
    found = MappedStore(store)
    with pytest.raises(ConfigError, match="rows.jsonl has changed"):
        found.verify()
    with pytest.raises(ConfigError, match="row 0 of the prompt store is damaged"):
        print(found[0].row)
    assert found[1].row == ROWS[1]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "store.json is damaged"),
        ("\x00\ufffd", "store.json is damaged"),
        ("[1]", "format None"),
        ('{"format": 2}', "format 2, and this version reads 1"),
        ('{"format": 1, "count": 7}', "store.json has changed since it was written"),
    ],
)
def test_a_header_that_is_not_what_was_written(store, content, message):
    (store / "store.json").write_text(content)
    with pytest.raises(ConfigError, match=message):
        MappedStore(store)


def test_an_edited_header(store):
    """One number changed by hand, of a file's length and of the file: the checksum shows it."""
    header = json.loads((store / "store.json").read_text())
    header["count"] = 4
    (store / "store.json").write_text(json.dumps(header))
    with pytest.raises(ConfigError, match="store.json has changed"):
        MappedStore(store)


def test_what_is_no_store(tmp_path):
    for path in (tmp_path, tmp_path / "none"):
        with pytest.raises(ConfigError, match="is no prompt store"):
            MappedStore(path)


def test_a_store_is_there_whole_or_not_at_all(tmp_path, tokenizer):
    """Nothing under its name, and nothing else left, after a fault, an interruption, or when there are no prompts."""
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), new_store(tmp_path / "s", tokenizer) as writer:
            writer.add([1], {"prompt": "x"})
            raise error
    with pytest.raises(ConfigError, match="there are no prompts"), new_store(tmp_path / "s", tokenizer):
        pass
    assert os.listdir(tmp_path) == []
    with new_store(tmp_path / "s", tokenizer) as writer:
        writer.add([1], {"prompt": "x"})
        assert not (tmp_path / "s").exists()
    with pytest.raises(ConfigError, match="exists already"), new_store(tmp_path / "s", tokenizer):
        pass
    assert os.listdir(tmp_path) == ["s"]


@pytest.mark.parametrize(
    ("other", "limit", "chat", "message"),
    [
        (dict(more=1), 999, False, r"tokenizer '.*' \(vocabulary 257\), and the model's is .*258\); prepare it again"),
        (dict(th="used"), 999, False, "prepare it again with --model"),
        ({}, 999, True, "data.chat_template = true: .* without the chat template; set data.chat_template=false"),
        ({}, 249, False, "data.max_prompt_tokens = 249: .* up to 250 tokens; raise it"),
    ],
)
def test_a_store_of_something_else(store, other, limit, chat, message):
    """Ids mean nothing in another vocabulary, and prompts without the template another task."""
    with pytest.raises(ConfigError, match=message):
        open_store(store, byte_tokenizer(**other), limit, chat)
    assert len(open_store(store, byte_tokenizer(), 250, False)) == 5


def test_a_store_with_a_chat_template(tmp_path, chat_tokenizer):
    with new_store(tmp_path / "s", chat_tokenizer, chat_template=True) as writer:
        writer.add([1], {"prompt": "x"})
    assert len(open_store(tmp_path / "s", chat_tokenizer, 9, True)) == 1
    with pytest.raises(ConfigError, match="data.chat_template = false: .* with the chat template"):
        open_store(tmp_path / "s", chat_tokenizer, 9, False)
    with pytest.raises(ConfigError, match="another chat template"):
        open_store(tmp_path / "s", byte_tokenizer(template=TEMPLATE + " "), 9, True)


def test_a_fingerprint_is_of_what_the_tokenizer_does(tmp_path, tokenizer):
    """Saving and loading changes the name and the class, not the ids; one merge changes ids and no token's number."""
    from transformers import AutoTokenizer

    tokenizer.save_pretrained(tmp_path)
    mine = Fingerprint.of(tokenizer)
    loaded = Fingerprint.of(AutoTokenizer.from_pretrained(tmp_path))
    assert replace(loaded, name=mine.name) == mine and loaded.name != mine.name
    unused, used = (Fingerprint.of(byte_tokenizer(th=how)) for how in ("unused", "used"))
    assert unused.vocabulary == used.vocabulary and unused.probe != used.probe


def test_a_fingerprint_never_changes(tokenizer):
    """Recorded: a change of ours, or of a library, would refuse every store that was made before."""
    found = Fingerprint.of(tokenizer)
    assert (found.size, found.vocabulary[:16], found.probe[:16]) == (257, "4a97d2ba20cca972", "a815d2315efd3235")


def test_opening_reads_nothing_ahead(tmp_path, tokenizer):
    """A sparse file of a terabyte cannot be read; it opens at once all the same."""
    with new_store(tmp_path / "s", tokenizer) as writer:
        writer.add([1, 2], {"prompt": "x"})
    header = json.loads((tmp_path / "s" / "store.json").read_text())
    size = 1 << 40
    os.truncate(tmp_path / "s" / "tokens.bin", size)
    np.save(tmp_path / "s" / "token_ends.npy", np.array([size // 2]))
    header["files"]["tokens.bin"]["bytes"] = size
    del header["checksum"]
    from flowrl_mega.data.store import _checksum

    header["checksum"] = _checksum(header)
    (tmp_path / "s" / "store.json").write_text(json.dumps(header))
    assert MappedStore(tmp_path / "s").tokens(0)[:3].tolist() == [1, 2, 0]
    shutil.rmtree(tmp_path / "s")
