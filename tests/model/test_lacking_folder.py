"""A folder that lacks something: the flag, the prefix, the head, or what makes it this model. Each cure is tried."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModel, AutoModelForCausalLM

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.hf_folder import HEAD, SINGLE, HfFolder

Change = Callable[[Path], Any]
NORM = "model.norm.weight"


def flag(value: bool | None) -> Change:
    """tie_word_embeddings; None removes it."""
    return edited(tie_word_embeddings=value)


def edited(**changes: Any) -> Change:
    def change(folder: Path) -> None:
        values = json.loads((folder / "config.json").read_text()) | changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))

    return change


def renamed(new: Callable[[str], str], without: str = "") -> Change:
    """The tensors under other names, `without` one of them."""

    def change(folder: Path) -> None:
        tensors = {new(name): tensor for name, tensor in load_file(folder / SINGLE).items() if name != without}
        save_file(tensors, folder / SINGLE, metadata={"format": "pt"})

    return change


def bare(name: str) -> str:
    return name.removeprefix("model.")


def saved_again(folder: Path) -> None:
    loaded = AutoModelForCausalLM.from_pretrained(folder)
    (folder / SINGLE).unlink()
    loaded.save_pretrained(folder)


def saved_without_head(folder: Path) -> None:
    AutoModel.from_pretrained(folder).save_pretrained(folder)


def both(*changes: Change) -> Change:
    return lambda folder: [change(folder) for change in changes]


FLAG, AGAIN = "set tie_word_embeddings = true in ", "AutoModelForCausalLM, which adds it, and save_pretrained()"
PREFIX, OTHER = "without the prefix 'model.': 'embed_tokens.weight' for 'model.embed_tokens.weight'", "another model"
MODULE = "without the prefix 'model.': 'module.model.embed_tokens.weight' for 'model.embed_tokens.weight'"
# whether the model is tied, what is done to it; what the message must contain, and must not; and its cure
LACKING: dict[str, tuple[bool, Change, list[str], list[str], list[Change]]] = {
    "the flag": (True, flag(None), [HEAD, FLAG], [OTHER, "prefix"], [flag(True)]),
    "the flag, which is false": (True, flag(False), [HEAD, FLAG], [OTHER, "prefix"], [flag(True)]),
    "the prefix": (False, renamed(bare), [PREFIX, AGAIN], [FLAG, OTHER], [saved_again]),
    "the prefix, tied": (True, renamed(bare), [PREFIX, AGAIN], [FLAG, OTHER], [saved_again]),
    "the prefix, saved by AutoModel": (True, saved_without_head, [PREFIX, AGAIN], [FLAG, OTHER], [saved_again]),
    "the prefix and the flag": (
        True, both(renamed(bare), flag(None)), [PREFIX, FLAG, f"no {HEAD!r}"], [AGAIN], [flag(True), saved_again],
    ),
    "no prefix, but has one more": (
        False, renamed("module.{}".format), [MODULE, "rename them"], [FLAG, AGAIN, OTHER],
        [renamed(lambda name: name.removeprefix("module."))],
    ),
    "the head": (False, renamed(str, HEAD), [HEAD, FLAG, "incomplete"], ["prefix", OTHER], []),
    "the head and the prefix": (False, renamed(bare, HEAD), [PREFIX, "without a head", FLAG], [AGAIN, OTHER], []),
    "a tensor": (False, renamed(str, NORM), [NORM, OTHER], [FLAG, "prefix"], []),
    "a tensor and the prefix": (False, renamed(bare, NORM), ["model.embed_tokens", OTHER], [FLAG, AGAIN], []),
    "what a qwen3 has": (False, edited(model_type="qwen3"), ["q_norm", OTHER], [FLAG, "prefix"], []),
}  # fmt: skip


@pytest.mark.parametrize("case", LACKING)
def test_what_a_folder_lacks_is_told_apart(case: str, tiny_model: Callable[..., Path], tmp_path: Path) -> None:
    """Not "another model" where a flag or a prefix is all that is missing; and the model is back after the cure."""
    tied, change, parts, absent, cures = LACKING[case]
    folder = shutil.copytree(tiny_model("qwen2", tie_word_embeddings=tied), tmp_path / "model")
    wanted = load_file(folder / SINGLE)
    change(folder)
    with pytest.raises(ConfigError) as refusal:
        HfFolder(folder).check(read_architecture(folder))
    message = str(refusal.value)
    assert all(part in message for part in parts) and not any(part in message for part in absent), message
    for cure in cures:
        cure(folder)
    if cures:
        found = HfFolder(folder)
        found.check(read_architecture(folder))
        assert found.tensors.keys() == wanted.keys()
        assert all(torch.equal(found.read(name), tensor) for name, tensor in wanted.items())
