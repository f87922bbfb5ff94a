"""Layouts and Megatron settings that a model cannot have are refused by name, with the fix."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from tiny_models import make

from flowrl_mega.config import Config, ConfigError
from flowrl_mega.model.architecture import Architecture, read_architecture, trainer_fields
from flowrl_mega.model.checks import PASSED_ON, check_head, check_layout, check_megatron, check_pipeline
from flowrl_mega.settings import validated


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


@pytest.fixture(scope="module")
def arch(tmp_path_factory) -> Architecture:
    return read_architecture(make("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4))


def config(megatron: dict[str, Any], **parallel: Any) -> Config:
    tree = {"run_dir": "run", "steps": 1, "model": {"path": "model"}, "data": {"task": "sums"}}
    tree |= {"reward": "flowrl_mega.rewards.sums:score", "parallel": parallel, "megatron": megatron}
    return validated(Config, tree, "")


FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
SELECTIVE = {"recompute_granularity": "selective"}
ACCEPTED: dict[str, tuple[dict[str, Any], dict[str, int]]] = {
    "none": ({}, {}),
    "full": (FULL, {}),
    "block": (FULL | {"recompute_method": "block", "recompute_num_layers": 2}, {}),
    "distributed": (FULL | {"distribute_saved_activations": True}, {"tp": 2}),
    "selective": (SELECTIVE, {}),
    "modules": (SELECTIVE | {"recompute_modules": ["core_attn", "mlp"]}, {}),
    "a short first stage": ({"num_layers_in_first_pipeline_stage": 1}, {"pp": 2}),
    "a short last stage": ({"num_layers_in_last_pipeline_stage": 1}, {"pp": 2}),
    "outputs let go": ({"deallocate_pipeline_outputs": True}, {"pp": 2}),
    "a preset's recomputation switched off": (dict.fromkeys(FULL), {}),
}


@pytest.mark.parametrize("case", ACCEPTED)
def test_megatron_settings_that_are_passed_on(case, arch):
    """tests/distributed/test_megatron_settings.py shows what they do."""
    settings, parallel = ACCEPTED[case]
    check_megatron(config(settings, **parallel), arch)


def test_every_setting_of_the_table_is_accepted_somewhere():
    assert set(PASSED_ON) == {name for settings, _ in ACCEPTED.values() for name in settings}


MEGATRON: dict[str, tuple[dict[str, Any], dict[str, int], str]] = {
    "unknown": ({"recompute_granularty": "full"}, {}, "not a field of .*; did you mean 'recompute_granularity'"),
    "the model's": ({"hidden_size": 64}, {}, "megatron.hidden_size = 64: follows from model.path; set that instead"),
    "the layout's": ({"tensor_model_parallel_size": 2}, {}, "follows from parallel.tp; set that instead"),
    "the precision's": ({"bf16": True}, {}, "follows from model.dtype; set that instead"),
    "FP8's": ({"first_last_layers_bf16": True}, {}, "follows from model.spec and model.fp8; set that instead"),
    "a mixture of experts": ({"num_moe_experts": 4}, {}, "megatron.num_moe_experts = 4: .* does not pass it on; .*"),
    "choice": ({"recompute_granularity": "half"}, {}, "recompute_granularity = 'half': .* 'full' or 'selective'"),
    "type": (FULL | {"recompute_num_layers": "one"}, {}, "recompute_num_layers = 'one': .*valid integer"),
    "no layers": (FULL | {"recompute_num_layers": 0}, {}, "recompute_num_layers = 0: must be 1 or more"),
    "no method": ({"recompute_granularity": "full"}, {}, "refused by TransformerConfig: .*recompute_method"),
    "method alone": ({"recompute_method": "uniform"}, {}, "read only with megatron.recompute_granularity=full"),
    "modules, but full": (
        FULL | {"recompute_modules": ["mlp"]},
        {},
        "read only with .*recompute_granularity=selective",
    ),
    "norms": (SELECTIVE | {"recompute_modules": ["layernorm"]}, {}, "'layernorm' is nothing .* core_attn, mlp"),
    "distributed over one": (FULL | {"distribute_saved_activations": True}, {}, "read only with .*parallel.tp of"),
    "one stage": ({"num_layers_in_first_pipeline_stage": 4}, {}, "read only with parallel.pp of at least 2"),
    "too long a stage": ({"num_layers_in_first_pipeline_stage": 9}, {"pp": 2}, "the model has 4 layers; take fewer"),
    "all layers in one stage": ({"num_layers_in_last_pipeline_stage": 4}, {"pp": 2}, "refused by TransformerConfig"),
}


@pytest.mark.parametrize("case", MEGATRON)
def test_megatron_settings_that_are_refused(case, arch):
    settings, parallel, message = MEGATRON[case]
    with pytest.raises(ConfigError, match=message) as refused:
        check_megatron(config(settings, **parallel), arch)
    assert str(refused.value).startswith("megatron") and "\n" not in str(refused.value)


def test_whatever_the_trainer_sets_is_refused(arch):
    """By name, with the value that it sets or the setting that it follows from: hidden_dropout trained another policy
    than the sampled one, silently."""
    for origin, fields in trainer_fields(arch, config({}).model, config({}).parallel).items():
        for name, value in fields.items():
            with pytest.raises(ConfigError) as refused:
                check_megatron(config({name: value}), arch)
            said = f"megatron.{name} = {value!r}: " + (f"follows from {origin};" if origin else f"must be {value!r};")
            assert str(refused.value).startswith(said)


def test_no_other_field_of_megatron_gets_through(arch):
    """Most of its 289 change nothing here; the others make another model, or end in a traceback."""
    from megatron.core.transformer.transformer_config import TransformerConfig

    through = set()
    for name, field in TransformerConfig.__dataclass_fields__.items():
        with contextlib.suppress(ConfigError):
            check_megatron(config({name: field.default}, pp=2, tp=2), arch)
            through.add(name)
    assert through <= set(PASSED_ON)


def test_liger_shares_out_a_vocabulary_on_gpus_only(arch, monkeypatch):
    """And where the ranks' shards are alike; alone it takes any."""
    check_head("liger", arch, 1)
    check_head("auto", arch, 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="ops.backend = liger: .*parallel.tp = 2.* CUDA tensors.*ops.backend=auto"):
        check_head("liger", replace(arch, vocab=102), 2)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    check_head("liger", replace(arch, vocab=102), 2)
    with pytest.raises(
        ConfigError, match="ops.backend = liger: .*parallel.tp = 2 .*vocabulary of 101.*ops.backend=auto"
    ):
        check_head("liger", arch, 2)
