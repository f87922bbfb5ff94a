"""What read_architecture takes from config.json, and what it refuses: each with field, value and fix."""

from __future__ import annotations

import json
import re

import pytest
from tiny_models import KINDS

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import read_architecture


def folder_with(tmp_path, tiny_model, kind: str = "llama", **changes):
    """The config.json of a tiny model with some values changed."""
    values = json.loads((tiny_model(kind) / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, **changes}))
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
