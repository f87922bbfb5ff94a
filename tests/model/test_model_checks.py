"""Layouts and Megatron settings that a model cannot have are refused by name, with the fix."""

from __future__ import annotations

import pytest
from tiny_models import make

from flowrl_mega.config import ConfigError
from flowrl_mega.model.architecture import read_architecture
from flowrl_mega.model.checks import check_layout, check_megatron, check_pipeline


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
