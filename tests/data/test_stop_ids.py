"""Which tokens end an answer, against transformers' generate wherever that knows any; and what names none."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tiny_models import make
from transformers import AutoModelForCausalLM, AutoTokenizer

from flowrl_mega.config import ConfigError
from flowrl_mega.data.stop_ids import check_stop_ids, stop_ids

ABSENT = "no such file"


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make("llama", tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def folder(tiny: Path, tmp_path: Path) -> Callable[..., Path]:
    """A copy whose generation_config.json is this text or these values, whose config.json names `config`, and whose
    tokenizer has the end token of id 1, or none."""

    def build(generation: Any, config: Any = None, has_end: bool = True) -> Path:
        copy = shutil.copytree(tiny, tmp_path / "model")
        (copy / "generation_config.json").unlink()
        if generation != ABSENT:
            text = generation if isinstance(generation, str) else json.dumps(generation)
            (copy / "generation_config.json").write_text(text)
        edit(copy / "config.json", eos_token_id=config)
        if not has_end:
            edit(copy / "tokenizer_config.json", eos_token=None, tokenizer_class=None)
        return copy

    return build


def edit(file: Path, **changes: Any) -> None:
    values = {**json.loads(file.read_text()), **changes}
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


# generation_config.json, config.json's ids, whether the tokenizer has an end -> the ids
NAMED: dict[str, tuple[Any, Any, bool, tuple[int, ...]]] = {
    "the generation's one": ({"eos_token_id": 5}, None, True, (5,)),
    "the generation's list": ({"eos_token_id": [9, 5, 9]}, None, True, (5, 9)),
    "the generation's before the config's": ({"eos_token_id": [9, 5]}, [1, 7], True, (5, 9)),
    "token 0": ({"eos_token_id": 0}, 7, True, (0,)),
    "the config's list": (ABSENT, [1, 5, 7], True, (1, 5, 7)),
    "the config's one": (ABSENT, 7, True, (7,)),
    "the config's, of a tokenizer without an end": (ABSENT, [7, 8], False, (7, 8)),
    "a generation config that names none": ({"do_sample": True}, [1, 5, 7], True, (1, 5, 7)),
    "null": ({"eos_token_id": None}, 7, True, (7,)),
    "an empty list": ({"eos_token_id": []}, 7, True, (7,)),
    "the tokenizer's": (ABSENT, None, True, (1,)),
    "the tokenizer's, after two that name none": ({}, [], True, (1,)),
}


@pytest.mark.parametrize("case", NAMED)
def test_the_ids_that_transformers_ends_at(case: str, folder: Callable[..., Path]) -> None:
    generation, config, has_end, wanted = NAMED[case]
    model = folder(generation, config, has_end)
    assert stop_ids(model, AutoTokenizer.from_pretrained(model)) == wanted
    theirs = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    theirs = theirs if isinstance(theirs, list) else [] if theirs is None else [theirs]
    assert not theirs or set(theirs) == set(wanted)  # where it knows none, its answers do not end


BROKEN: dict[str, tuple[str, list[str]]] = {
    "no JSON": ("{", ["not valid JSON", "get the model folder again"]),
    "empty": ("", ["not valid JSON", "get the model folder again"]),
    "a list": ("[]", ["holds []", "not a JSON object"]),
    "null": ("null", ["holds null", "not a JSON object"]),
    "a number": ("5", ["holds 5", "not a JSON object"]),
    "a byte order mark": ('\ufeff{"eos_token_id": [5]}', ["not valid JSON", "BOM"]),
    "a token's text": ('{"eos_token_id": "</s>"}', ["eos_token_id = \"</s>\"", "(the tokenizer's is 1)", "remove"]),
    "an id as text": ('{"eos_token_id": "5"}', ["eos_token_id = \"5\"", "a token's id or a list"]),
    "texts": ('{"eos_token_id": [5, "</s>"]}', ["eos_token_id = [5, \"</s>\"]"]),
    "a fraction": ('{"eos_token_id": 5.0}', ["eos_token_id = 5.0"]),
    "true": ('{"eos_token_id": true}', ["eos_token_id = true"]),
    "a list of lists": ('{"eos_token_id": [[5]]}', ["eos_token_id = [[5]]"]),
    "a list of null": ('{"eos_token_id": [null]}', ["eos_token_id = [null]"]),
    "an object": ('{"eos_token_id": {"id": 5}}', ["eos_token_id = {\"id\": 5}"]),
}  # fmt: skip


@pytest.mark.parametrize("case", BROKEN)
def test_a_broken_file_is_named(case: str, folder: Callable[..., Path]) -> None:
    """Also where the config names ends of its own: the file may have meant others."""
    text, parts = BROKEN[case]
    model = folder(text, [7])
    with pytest.raises(ConfigError) as refusal:
        stop_ids(model, AutoTokenizer.from_pretrained(model))
    message = str(refusal.value).replace("\ufeff", "")
    assert f"{model / 'generation_config.json'}: " in message and "\n" not in message
    assert all(part in message for part in parts), message


def test_bytes_that_are_no_text(folder: Callable[..., Path]) -> None:
    model = folder({})
    (model / "generation_config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(ConfigError, match=r"generation_config.json: not valid JSON"):
        stop_ids(model, AutoTokenizer.from_pretrained(model))


def test_no_end_at_all(folder: Callable[..., Path]) -> None:
    """Every answer would go on to its last token; which some want."""
    model = folder({}, None, has_end=False)
    tokenizer = AutoTokenizer.from_pretrained(model)
    with pytest.raises(ConfigError, match=r"says which token ends an answer; write its id as eos_token_id") as refusal:
        stop_ids(model, tokenizer)
    assert "rollout.ignore_eos=true" in str(refusal.value)
    assert stop_ids(model, tokenizer, needed=False) == ()
    (model / "generation_config.json").write_text('{"eos_token_id": 5}')  # as the message says
    assert stop_ids(model, tokenizer) == (5,)


@pytest.mark.parametrize(("ids", "wrong"), [((0, 100), None), ((), None), ((1, 101), 101), ((-1, 5), -1)])
def test_ends_that_the_model_cannot_say(ids: tuple[int, ...], wrong: int | None) -> None:
    if wrong is None:
        check_stop_ids(ids, 101, "m")
        return
    with pytest.raises(ConfigError, match=rf"end at token {wrong} .* outside the model's vocabulary of 101"):
        check_stop_ids(ids, 101, "m")
