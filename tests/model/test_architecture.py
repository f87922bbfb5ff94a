"""What read_architecture takes from config.json, and what it refuses: each with field, value and fix."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import torch
from tiny_models import KINDS
from transformers import AutoConfig
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import SIZES, read_architecture


def folder_with(tmp_path, tiny_model, kind: str = "llama", **changes):
    """The config.json of a tiny model with some values changed; rope_parameters = None removes them."""
    values = json.loads((tiny_model(kind) / "config.json").read_text()) | changes
    if values["rope_parameters"] is None:
        del values["rope_parameters"]
    (tmp_path / "config.json").write_text(json.dumps(values))
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_sizes_come_from_the_config(kind, tiny_model):
    arch = read_architecture(tiny_model(kind))
    assert (arch.layers, arch.hidden, arch.heads, arch.kv_heads, arch.ffn, arch.vocab) == (2, 32, 4, 2, 48, 101)
    assert arch.head_dim == (16 if kind == "qwen3" else 8)
    assert arch.tied == (kind in ("llama", "qwen3"))
    assert arch.qkv_bias == (kind == "qwen2")
    assert arch.qk_norm == (kind == "qwen3")
    assert [arch.padded_vocab(tp) for tp in (1, 2, 4)] == [101, 102, 104]


REFUSED = {
    "model_type": (
        {"model_type": "gpt2"},
        "model_type = 'gpt2' is not supported; one of llama, mistral, qwen2, qwen3 is",
    ),
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act = 'gelu' is not supported; silu is"),
    "mlp_bias": ({"mlp_bias": True}, "mlp_bias = True is not supported; false is"),
    "attention_bias": ({"attention_bias": True}, "attention_bias = True is not supported; false is"),
    "rope_type": (
        {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0}},
        "rope_type = 'yarn' is not supported; default, linear or llama3 is",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_would_be_computed_differently_is_refused(name, tiny_model, tmp_path):
    """Silently ignoring such a field would train another model than the one that was given."""
    changes, message = REFUSED[name]
    folder = folder_with(tmp_path, tiny_model, **changes)
    with pytest.raises(ConfigError, match=re.escape(f"{folder / 'config.json'}: {message}")):
        read_architecture(folder)


def test_sliding_windows_are_refused(tiny_model, tmp_path):
    folder = folder_with(tmp_path, tiny_model, "qwen2", use_sliding_window=True, sliding_window=64)
    with pytest.raises(ConfigError, match="use_sliding_window = True is not supported; false is"):
        read_architecture(folder)


def test_a_folder_without_a_readable_config_is_named(tmp_path):
    with pytest.raises(ConfigError, match=re.escape(f"model.path = {str(tmp_path)!r}: holds no config.json")):
        read_architecture(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConfigError, match="not valid JSON .* get the model folder again"):
        read_architecture(tmp_path)


SCALED = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
SCALED["original_max_position_embeddings"] = 16
OLD: dict[str, Any] = {"rope_parameters": None, "rope_theta": 1e4}  # as transformers 4 wrote it


def rope_of(name: str, value: Any) -> tuple[dict[str, Any], str]:
    """Changes to config.json that give the rotary setting `name` this value, and what a message calls it."""
    match name.split():
        case ["theta"]:
            return OLD | {"rope_theta": value}, "rope_theta"
        case ["theta", "5"]:
            return {"rope_parameters": {"rope_type": "default", "rope_theta": value}}, "rope_parameters.rope_theta"
        case ["linear", key]:
            return OLD | {"rope_scaling": {"type": "linear", key: value}}, f"rope_scaling.{key}"
        case ["llama3", key]:
            return OLD | {"rope_scaling": SCALED | {key: value}}, f"rope_scaling.{key}"
        case ["llama3", "5", key]:
            return {"rope_parameters": {"rope_theta": 1e4} | SCALED | {key: value}}, f"rope_parameters.{key}"
    raise AssertionError(name)


NAMES = ["theta", "theta 5", "linear factor", "llama3 5 factor", *(f"llama3 {key}" for key in list(SCALED)[1:])]
NO_NUMBERS = ["1e6", "", None, 0, 0.0, -1e4, True, float("nan"), float("inf"), [1e4], {}]


@pytest.mark.parametrize("value", NO_NUMBERS, ids=json.dumps)
@pytest.mark.parametrize("name", NAMES)
def test_rotary_settings_that_are_no_numbers(name, value, tiny_model, tmp_path, capfd):
    """Text and null ended in a traceback, 0 in frequencies of infinity. One message, and none of transformers' own."""
    changes, called = rope_of(name, value)
    folder = folder_with(tmp_path, tiny_model, **changes)
    with pytest.raises(ConfigError) as refusal:
        read_architecture(folder)
    assert str(refusal.value).startswith(f"{folder / 'config.json'}: {called} = {json.dumps(value)}: must be a number")
    assert capfd.readouterr() == ("", "")


# what is right, or is not read
ACCEPTED: dict[str, dict[str, Any]] = {
    "a whole number": OLD | {"rope_theta": 10000},
    "a large one": OLD | {"rope_theta": 1e6, "rope_scaling": None},
    "none at all": {"rope_parameters": None},
    "linear": OLD | {"rope_scaling": {"type": "linear", "factor": 4}},
    "llama3": OLD | {"rope_scaling": SCALED},
    "llama3 as transformers 5 writes it": {"rope_parameters": {"rope_theta": 5e5} | SCALED},
    "a factor that the kind has not": OLD | {"rope_scaling": {"rope_type": "default", "factor": None}},
    "null for as many heads as queries": {"num_key_value_heads": None},
    "null for the usual size of a head": {"head_dim": None},
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_rotary_settings_as_transformers_reads_them(case, tiny_model, tmp_path):
    folder = folder_with(tmp_path, tiny_model, **ACCEPTED[case])
    theirs = LlamaRotaryEmbedding(AutoConfig.from_pretrained(folder))
    assert torch.equal(read_architecture(folder).inv_freq, theirs.inv_freq)


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("name", SIZES)
def test_sizes_below_one(name, value, tiny_model, tmp_path):
    folder = folder_with(tmp_path, tiny_model, **{name: value})
    with pytest.raises(ConfigError, match=re.escape(f"config.json: {name} = {value}: must be 1 or more")):
        read_architecture(folder)


def test_what_transformers_refuses_is_told_in_one_line(tiny_model, tmp_path):
    folder = folder_with(tmp_path, tiny_model, vocab_size="101")
    with pytest.raises(ConfigError, match=r"refused by transformers \(Validation error for field 'vocab_size': .*str"):
        read_architecture(folder)
