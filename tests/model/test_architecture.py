"""What read_architecture takes from config.json, and what it refuses: each with field, value and fix."""

from __future__ import annotations

import json
import re

import pytest
from tiny_models import KINDS, make

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import check_layout, check_megatron, check_pipeline, read_architecture


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


def test_a_layout_that_does_not_divide_the_model(tmp_path):
    """The fix names the sizes that do."""
    make("llama", tmp_path)
    arch = read_architecture(tmp_path)
    check_layout(arch, 2)
    with pytest.raises(ConfigError, match="parallel.tp = 3: does not divide the model's 4 attention heads; .* 1, 2$"):
        check_layout(arch, 3)
    with pytest.raises(ConfigError, match="parallel.tp = 4: does not divide the model's 2 key-value heads; .* 1, 2$"):
        check_layout(arch, 4)


def test_pipeline_stages_that_do_not_divide_the_layers(tmp_path):
    """The fix is the nearest number that does."""
    make("llama", tmp_path, num_hidden_layers=6)
    arch = read_architecture(tmp_path)
    check_pipeline(arch, 3, 2)
    with pytest.raises(ConfigError, match="parallel.pp = 5: does not divide the model's 6 layers; use 6$"):
        check_pipeline(arch, 5, 1)
    with pytest.raises(ConfigError, match="parallel.vpp = 2: 2 stages have 3 layers each; use 1, a divisor of that$"):
        check_pipeline(arch, 2, 2)


def test_megatron_settings_are_checked_by_name():
    check_megatron({"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1})
    with pytest.raises(ConfigError, match="megatron.recompute_granularty: .*did you mean 'recompute_granularity'"):
        check_megatron({"recompute_granularty": "full"})
    with pytest.raises(ConfigError, match="megatron.hidden_size = 64: follows from model.path .* leave it out"):
        check_megatron({"hidden_size": 64})
