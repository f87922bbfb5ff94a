"""What the data settings lead to: files or stores, and a part of them held out."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from on_ranks import config_for

from flowrl_mega.config import ConfigError
from flowrl_mega.config_file import load_config
from flowrl_mega.data.fingerprint import PROBE
from flowrl_mega.data.load_prompts import kinds_of, load_prompts
from flowrl_mega.data.prompts import Prompt, Prompts, Row, tokenized
from flowrl_mega.data.split import split
from flowrl_mega.data.store import new_store
from flowrl_mega.data.tokenizer import char_tokenizer

ROWS = [{"prompt": f"{n % 40}:", "k": n, "kind": "math" if n % 2 else "code", "task": "t"} for n in range(100)]


@pytest.fixture
def tokenizer():
    return char_tokenizer("0123456789:z")


@pytest.fixture
def model(tokenizer, tmp_path: Path) -> Path:
    """As much of a model as the prompts need."""
    tokenizer.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def in_store(rows: list[Row], tokenizer: Any, folder: Path, chat_template: bool = False) -> Path:
    with new_store(folder, tokenizer, chat_template=chat_template) as writer:
        for prompt in tokenized(rows, tokenizer):
            writer.add(prompt.token_ids, prompt.row)
    return folder


def rows_of(prompts: Prompts) -> list[Row]:
    return [prompt.row for prompt in prompts]


@pytest.mark.parametrize("kind", ["file", "store"])
def test_a_share_held_out_is_the_same_of_a_file_and_of_its_store(kind: str, tokenizer, model: Path, tmp_path: Path):
    """A prompt that occurs twice must not be trained on and held out at once: evaluation would measure memory. A run
    that moves from a file to a store must keep its held-out prompts."""
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    if kind == "store":
        path = in_store(ROWS, tokenizer, tmp_path / "store")
    train, held_out, _, _ = load_prompts(config_for(model, data={"path": str(path), "held_out": 0.25}, seed=1))
    assert held_out is not None
    assert not {tuple(p.token_ids) for p in train} & {tuple(p.token_ids) for p in held_out}
    assert len({p.row["prompt"] for p in held_out}) == 10
    assert Counter(row["k"] for row in rows_of(train) + rows_of(held_out)) == Counter(range(100))
    assert [row["k"] for row in rows_of(held_out)][:6] == [2, 9, 16, 18, 19, 27]
    assert all(ROWS[prompt.index] == prompt.row for prompt in train)
    assert kinds_of(train) == {"math", "code"}


def test_other_seeds_hold_out_others_and_extremes_are_refused(tokenizer) -> None:
    """A tiny share still holds out a prompt; one that leaves no training is refused."""
    prompts = tokenized(ROWS, tokenizer)
    held_out = [rows_of(split(prompts, 0.25, seed)[1]) for seed in (1, 1, 2)]
    assert held_out[0] == held_out[1] != held_out[2]
    three = [Prompt(i, [i], {}) for i in range(3)]
    assert len(split(three, 0.01, seed=0)[1]) == 1
    with pytest.raises(ConfigError, match=r"data.held_out = 0.9: leaves nothing to train on \(3 distinct"):
        split(three, 0.9, seed=0)


def test_held_out_by_file_and_by_store(tokenizer, model: Path, tmp_path: Path) -> None:
    """Held out as they are."""
    (tmp_path / "held.jsonl").write_text('{"prompt": "z"}\n')
    for path in (tmp_path / "held.jsonl", in_store([{"prompt": "z"}], tokenizer, tmp_path / "held")):
        train, held_out, _, _ = load_prompts(config_for(model, data={"task": "sums", "held_out": str(path)}))
        assert held_out is not None
        assert (len(train), rows_of(held_out)) == (100, [{"prompt": "z"}])


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({"path": "nowhere"}, r"data.path = 'nowhere': no such file; give a JSON lines file, or a prompt store"),
        ({"task": "sums", "held_out": "nowhere"}, r"data.held_out = 'nowhere': no such file; give a share \(0.1\)"),
        ({"task": "sums", "held_out": 1.5}, r"data.held_out = 1.5: a share must lie between 0 and 1"),
        ({"task": "sums", "loader": "dali"}, r"data.loader = dali: reads prompt stores only"),
    ],
)
def test_what_cannot_be_read_is_told_with_the_settings(data: dict[str, Any], message: str, tmp_path: Path) -> None:
    """Before any process starts."""
    path = tmp_path / "config.yaml"
    tree = {"run_dir": "r", "steps": 1, "model": {"path": "m"}, "data": data, "reward": "r"}
    path.write_text(json.dumps(tree))
    with pytest.raises(ConfigError, match=message):
        load_config(path)


class Counting:
    """A tokenizer that remembers each text that it is given."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer, self.seen = tokenizer, Counter[str]()

    def __call__(self, texts: list[str] | str, **arguments: Any) -> Any:
        self.seen.update([texts] if isinstance(texts, str) else texts)
        return self.tokenizer(texts, **arguments)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.tokenizer, name)


@pytest.mark.parametrize("held_out", ["a share", "a file", "a store"])
@pytest.mark.parametrize("data", ["file", "task", "store"])
def test_each_row_is_tokenized_once(
    data: str, held_out: str, tokenizer, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And those of a store, which holds the ids, never: a hundred thousand prompts take half a minute."""
    trained, held = [{"prompt": f"{n}:"} for n in range(30)], [{"prompt": f"{n}z"} for n in range(9)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in trained))
    (tmp_path / "held.jsonl").write_text("".join(json.dumps(row) + "\n" for row in held))
    settings: dict[str, Any] = {
        "file": {"path": str(tmp_path / "rows.jsonl")},
        "task": {"task": "sums", "task_args": {"lo": 10, "hi": 39}},
        "store": {"path": str(in_store(trained, tokenizer, tmp_path / "store"))},
    }[data]
    settings["held_out"] = {
        "a share": 0.2,
        "a file": str(tmp_path / "held.jsonl"),
        "a store": str(in_store(held, tokenizer, tmp_path / "held")),
    }[held_out]
    counting = Counting(tokenizer)
    monkeypatch.setattr("flowrl_mega.data.load_prompts.load_tokenizer", lambda path: counting)
    load_prompts(config_for(model, data=settings))
    seen = [text for text in counting.seen.elements() if text not in PROBE]
    rows = {"file": [row["prompt"] for row in trained], "task": [f"{n}:" for n in range(10, 40)], "store": []}[data]
    assert sorted(seen) == sorted(rows + [row["prompt"] for row in held if held_out == "a file"])


def test_a_folder_that_is_no_store(model: Path) -> None:
    with pytest.raises(ConfigError, match=r"is no prompt store"):
        load_prompts(config_for(model, data={"path": str(model)}))
