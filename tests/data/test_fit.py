"""Prompts whose tokens the model has not, and prompts that leave no room for an answer: refused with the row."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from typing import Any

import pytest
from on_ranks import config_for
from tiny_models import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl_mega.config import ConfigError
from flowrl_mega.data.fit import check_prompts, model_vocabulary
from flowrl_mega.data.load_prompts import load_prompts
from flowrl_mega.data.prompts import tokenized
from flowrl_mega.data.store import MappedStore, new_store

VOCAB, POSITIONS = 101, 128  # of tiny_models
KNOWN, UNKNOWN = "<x85>", "<x86>"  # the last token that the model has a row for, and the next one


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens <x0> to <x99> are added to its tokenizer of 15, and the model has rows for 86 of them."""
    folder = make("qwen2", tmp_path_factory.mktemp("model"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens([f"<x{i}>" for i in range(100)])
    tokenizer.save_pretrained(folder)
    assert tokenizer.convert_tokens_to_ids([KNOWN, UNKNOWN]) == [VOCAB - 1, VOCAB]
    return folder


def data_of(prompts: list[str], kind: str, model: Path, folder: Path) -> str:
    """The path of a file, or of a store, with these prompts."""
    rows = [{"prompt": prompt} for prompt in prompts]
    path = folder / f"{kind} {len(prompts)}"
    if kind == "store":
        tokenizer = AutoTokenizer.from_pretrained(model)
        with new_store(path, tokenizer) as writer:
            for prompt in tokenized(rows, tokenizer):
                writer.add(prompt.token_ids, prompt.row)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def refusal(model: Path, data: dict[str, Any], max_tokens: int = 8, **sections: Any) -> str:
    config = config_for(model, data=data, rollout={"max_tokens": max_tokens, **sections.pop("rollout", {})}, **sections)
    try:
        check_prompts(load_prompts(config), config, VOCAB, POSITIONS)
    except ConfigError as error:
        return str(error)
    return ""


PROMPTS = [f"{n}+" for n in range(20)]


@pytest.mark.parametrize("kind", ["file", "store"])
@pytest.mark.parametrize(("row", "token"), [(0, UNKNOWN), (7, UNKNOWN), (19, "<x99>"), (7, KNOWN), (0, "")])
def test_tokens_that_the_model_has_no_row_for(kind: str, row: int, token: str, model: Path, tmp_path: Path) -> None:
    """At the first step the embedding would be asked for a row that it has not."""
    prompts = [prompt + token * (index == row) for index, prompt in enumerate(PROMPTS)]
    path = data_of(prompts, kind, model, tmp_path)
    for data, setting in (
        ({"path": path}, "data"),
        ({"path": path, "held_out": 0.3}, "data"),
        ({"task": "sums", "held_out": path}, "data.held_out"),
    ):
        message = refusal(model, data)
        if token in ("", KNOWN):
            assert not message
        elif "held_out" in data and kind == "file" and setting == "data":
            assert f": row {row} holds token id" in message  # on the side where it fell
        else:
            number = 114 if token == "<x99>" else VOCAB
            assert message.startswith(f"{setting}: row {row} holds token id {number} ('{token}'), outside the"), message
            assert f"vocabulary of {VOCAB}; " in message and "resize_token_embeddings" in message


def test_the_cure_works(model: Path, tmp_path: Path) -> None:
    """As the message says."""
    tokenizer = AutoTokenizer.from_pretrained(model)
    resized = AutoModelForCausalLM.from_pretrained(model)
    resized.resize_token_embeddings(len(tokenizer))
    for part in (resized, tokenizer):
        part.save_pretrained(tmp_path / "resized")
    assert model_vocabulary(tmp_path / "resized") == 115
    config = config_for(model, data={"path": data_of([UNKNOWN, "<x99>"], "file", model, tmp_path)})
    check_prompts(load_prompts(config), config, 115, POSITIONS)


def test_a_store_is_searched_in_pieces(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The row of the token at every place: first and last of a prompt, and on either side of a piece."""
    lengths = [1, 3, 1, 2]
    for place in range(sum(lengths)):
        tokens = [1] * place + [VOCAB] + [1] * (sum(lengths) - place - 1)
        path = tmp_path / str(place)
        with new_store(path, AutoTokenizer.from_pretrained(model)) as writer:
            for n in lengths:
                writer.add(tokens[:n], {"prompt": "p"})
                tokens = tokens[n:]
        row = [0, 1, 1, 1, 2, 3, 3][place]
        store = MappedStore(path)
        assert (store.first_beyond(VOCAB), store.first_beyond(VOCAB + 1)) == (row, None)
        monkeypatch.setattr("flowrl_mega.data.store.PIECE", 2)
        assert (store.first_beyond(VOCAB), store.first_beyond(VOCAB + 1)) == (row, None)


@pytest.mark.parametrize("kind", ["file", "store"])
@pytest.mark.parametrize(
    ("length", "max_tokens", "parts"),
    [
        (120, 8, []),
        (121, 8, ["rollout.max_tokens = 8: 129 with the 121 tokens of data, row 1", "128", "max_tokens to 7"]),
        (121, 7, []),
        (4, 124, []),
        (4, 125, ["rollout.max_tokens = 125", "lower rollout.max_tokens to 124"]),
        (127, 1, []),
        (128, 1, ["data: row 1 has 128 tokens", "max_position_embeddings is 128", "leave it out"]),
        (300, 8, ["data: row 1 has 300 tokens"]),
    ],
)  # fmt: skip
def test_positions(kind: str, length: int, max_tokens: int, parts: list[str], model: Path, tmp_path: Path) -> None:
    """The longest prompt and an answer, to the token; servers say themselves how much they take."""
    path = data_of(["1", "1" * length, "2"], kind, model, tmp_path)
    message = refusal(model, {"path": path}, max_tokens)
    assert bool(message) == bool(parts) and all(part in message for part in parts), message
    message = refusal(model, {"task": "sums", "held_out": path}, max_tokens)
    assert bool(message) == bool(parts) and all(p.replace("data", "data.held_out") in message for p in parts), message
    assert not refusal(model, {"path": path}, max_tokens, rollout={"engine": "sglang"})


@pytest.mark.parametrize("vocab", [VOCAB, None, 115])
def test_preparing(vocab: Any, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The row is listed and the others are kept; beside a mere tokenizer nobody knows what the model has."""
    code, message = prepare(model, tmp_path, vocab, capsys)
    assert code == 0, message
    refused = [json.loads(line) for line in (tmp_path / "store" / "refused.jsonl").read_text().splitlines()]
    assert len(MappedStore(tmp_path / "store")) + len(refused) == 3
    assert [(row["row"], row["reason"]) for row in refused] == [(2, "outside the vocabulary")] * (vocab == VOCAB)
    assert all("holds token id 101 ('<x86>'), outside the model's vocabulary" in row["detail"] for row in refused)


def test_preparing_for_a_broken_config(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, message = prepare(model, tmp_path, "101", capsys)
    assert code == 2 and "vocab_size" in message and message.count("\n") == 1, message


def prepare(model: Path, tmp_path: Path, vocab: Any, capsys: pytest.CaptureFixture[str]) -> tuple[int, str]:
    """tools/prepare_data.py on three rows, the second with an unknown token; its exit code and messages."""
    folder = tmp_path / "model"
    AutoTokenizer.from_pretrained(model).save_pretrained(folder)
    if vocab is not None:
        (folder / "config.json").write_text(json.dumps({"model_type": "qwen2", "vocab_size": vocab}))
    sys.path.append(str(Path(__file__).parents[2] / "tools"))
    tool = importlib.import_module("prepare_data")
    path = data_of(["1+1", UNKNOWN, f"2{KNOWN}"], "file", model, tmp_path)
    arguments = ["--recipe", "rows", "--input", path, "--model", str(folder), "--out", str(tmp_path / "store")]
    return tool.main(arguments), capsys.readouterr().err
