"""Which layers and recipes a machine and a model get: the choice, Megatron's fields for it, and every refusal."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import Any

import pytest
import torch

from flowrl_mega.config import ConfigError, ModelSettings, ParallelSettings
from flowrl_mega.model import precision
from flowrl_mega.model.architecture import Architecture, transformer_config
from flowrl_mega.model.checks import check_layers
from flowrl_mega.model.weights import fill
from flowrl_mega.parallel import backends
from flowrl_mega.parallel.backends import Found
from flowrl_mega.parallel.layout import Layout

ENGINE = Found(True, "Transformer Engine 2.20.2")
ABSENT = Found(False, "Transformer Engine is not installed")
ADA = Found(
    False, "NVIDIA L4 (compute capability 8.9): FP8 block scaled GEMM requires compute capability 9.0 or higher"
)


def settings(**values: Any) -> ModelSettings:
    return ModelSettings(path="model", **values)


def arch(**changes: Any) -> Architecture:
    sizes = dict(layers=4, hidden=64, heads=4, kv_heads=2, head_dim=16, ffn=128, vocab=100, max_positions=64)
    other = dict(norm_eps=1e-6, init_std=0.02, tied=True, qkv_bias=False, qk_norm=False, inv_freq=torch.ones(8))
    return Architecture(model_type="llama", **{**sizes, **other, **changes})


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """A GPU with Transformer Engine and FP8, but (like Ada) without block scaling."""
    monkeypatch.setattr(backends, "transformer_engine", lambda: ENGINE)
    monkeypatch.setattr(backends, "fp8_support", lambda recipe: ADA if recipe == "blockwise" else Found(True, "L4"))


@pytest.fixture
def nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backends, "transformer_engine", lambda: ABSENT)
    monkeypatch.setattr(backends, "fp8_support", lambda recipe: ABSENT)


def test_auto_takes_transformer_engine_where_it_can_be_used(engine: None) -> None:
    """But not for fp32, of which its GEMMs make TF32: that only on request."""
    assert precision.layer_spec(settings(dtype="bf16")) == ("te", ENGINE.why)
    assert precision.layer_spec(settings(dtype="bf16", spec="local")) == ("local", "model.spec = local")
    assert precision.layer_spec(settings(spec="te")) == ("te", ENGINE.why)
    spec, why = precision.layer_spec(settings())
    assert spec == "local" and "TF32" in why


def test_auto_without_it_says_why(nothing: None) -> None:
    assert precision.layer_spec(settings(dtype="bf16")) == ("local", ABSENT.why)


def built(model: ModelSettings) -> Any:
    """Megatron's configuration, which checks the fields of a recipe itself; fused rotary positions need the library."""
    return transformer_config(arch(), model, ParallelSettings(), {"apply_rope_fusion": False})


@pytest.mark.parametrize(
    ("model", "format", "in_bf16"),
    [
        (settings(dtype="bf16"), None, []),
        (settings(dtype="bf16", fp8="tensorwise"), "hybrid", [0, 3]),
        (settings(dtype="bf16", fp8="blockwise"), "e4m3", [0, 3]),
        (settings(dtype="bf16", fp8="tensorwise", fp8_first_last_bf16=False), "hybrid", []),
        (settings(dtype="bf16", fp8="delayed"), "hybrid", []),
    ],
    ids=["bf16", "tensorwise", "blockwise", "tensorwise, all layers", "delayed"],
)
def test_fields_of_a_recipe(model: ModelSettings, format: str | None, in_bf16: list[int], engine: None) -> None:
    """Which layers are in bf16 is asked of the function that Megatron's layers ask."""
    from megatron.core.fp8_utils import is_first_last_bf16_layer

    config = built(model)
    assert config.fp8 == format
    assert config.fp8_recipe == ("delayed" if model.fp8 == "off" else model.fp8)  # Megatron's default is not read
    assert [i for i in range(4) if is_first_last_bf16_layer(config, i)] == in_bf16
    assert config.bias_activation_fusion and config.bias_dropout_fusion
    assert not config.gradient_accumulation_fusion and not config.fp8_param
    assert config.disable_parameter_transpose_cache, "weights would be stale where the policy is scored"


def test_delayed_scales_are_shared_within_a_replica_only(engine: None) -> None:
    """Data-parallel ranks have unequal numbers of micro-batches, so a reduction over them in each would hang."""
    config = built(settings(dtype="bf16", fp8="delayed"))
    assert config.tp_only_amax_red
    assert (config.fp8_amax_history_len, config.fp8_amax_compute_algo) == (1024, "max")


def test_local_layers_have_no_fusions(nothing: None) -> None:
    config = built(settings(dtype="bf16"))
    assert not (config.bias_activation_fusion or config.bias_dropout_fusion or config.apply_rope_fusion or config.fp8)


def test_rotary_fusion_goes_with_the_layers(engine: None) -> None:
    assert precision.layer_fields(settings(dtype="bf16"))["apply_rope_fusion"]
    assert not precision.layer_fields(settings(dtype="bf16", spec="local"))["apply_rope_fusion"]


def test_weights_in_fp8(engine: None) -> None:
    """The policy's alone: no optimizer makes the reference's of fp32 ones."""
    model = settings(dtype="bf16", fp8="tensorwise", fp8_params=True, reference_fp8="tensorwise")
    assert built(model).fp8_param and not built(precision.reference_settings(model)).fp8_param
    assert "weights kept in FP8" in precision.describe_fp8(model)


def test_a_weight_in_fp8_is_filled_with_its_exact_value_beside_it() -> None:
    """The fp32 weight is made of the latter; of the former it would start with FP8's rounding."""
    parameter = torch.zeros(4, dtype=torch.float8_e4m3fn)
    parameter._high_precision_init_val = torch.zeros(4, dtype=torch.bfloat16)  # type: ignore[attr-defined]
    values = torch.tensor([1.0, 1.03125, -3.1875, 0.1], dtype=torch.bfloat16)
    fill(parameter, values)
    assert torch.equal(parameter._high_precision_init_val, values)  # type: ignore[attr-defined]
    assert parameter.float().tolist() == [1.0, 1.0, -3.25, 0.1015625]


def test_the_reference_has_a_recipe_of_its_own() -> None:
    for ends, wanted in ((None, True), (False, False)):
        model = settings(dtype="bf16", fp8="delayed", reference_fp8="tensorwise", fp8_first_last_bf16=ends)
        reference = precision.reference_settings(model)
        assert (reference.fp8, precision.first_last_bf16(reference)) == ("tensorwise", wanted)
    assert precision.reference_settings(settings(dtype="bf16", fp8="delayed")).fp8 == "off"


@pytest.mark.parametrize(
    ("values", "rows", "rows_in_shares"),
    [
        ({}, 1, 1),
        ({"fp8": "tensorwise"}, 16, 16),
        ({"fp8": "blockwise"}, 16, 128),
        ({"reference_fp8": "tensorwise"}, 16, 16),
        ({"fp8": "tensorwise", "reference_fp8": "blockwise"}, 16, 128),
    ],
)
def test_rows_of_a_rank_are_a_multiple_in_fp8(values: dict[str, str], rows: int, rows_in_shares: int) -> None:
    """Of a GEMM's 16; and of a block's 128 where ranks gather their shares of the rows."""
    model = settings(dtype="bf16", **values)
    assert precision.row_alignment(model, sequence_parallel=False) == rows
    assert precision.row_alignment(model, sequence_parallel=True) == rows_in_shares


@pytest.mark.parametrize(
    ("sizes", "each", "rows"),
    [
        ({"tp": 1, "cp": 1, "sequence_parallel": False}, 1, 16),
        ({"tp": 2, "cp": 1, "sequence_parallel": True}, 1, 32),
        ({"tp": 1, "cp": 2, "sequence_parallel": False}, 4, 32),
        ({"tp": 4, "cp": 3, "sequence_parallel": True}, 24, 192),
    ],
)
def test_every_share_of_the_rows_is_such_a_multiple(sizes: dict[str, int], each: int, rows: int) -> None:
    """tp shares them out under sequence parallelism, cp always, and every sequence in halves of its chunks."""
    layout = Layout(**dict.fromkeys(f.name for f in fields(Layout)) | sizes | {"row_alignment": 16})
    assert (layout.sequence_multiple, layout.row_multiple) == (each, rows)


REFUSED: dict[str, tuple[dict[str, Any], dict[str, Any], int, str]] = {
    "this GPU": ({"fp8": "blockwise"}, {}, 1, f"model.fp8 = blockwise: {ADA.why}; set model.fp8=off or tensorwise"),
    "this GPU, reference": ({"reference_fp8": "blockwise"}, {}, 1, "set model.reference_fp8=off or tensorwise"),
    "hidden size": ({"fp8": "tensorwise"}, {"hidden": 72}, 1, "hidden size is 72 a rank at parallel.tp = 1"),
    "tp": ({"fp8": "tensorwise"}, {"ffn": 96}, 4, "feed-forward size is 24 a rank at parallel.tp = 4; take a smaller"),
    "query": ({"fp8": "tensorwise"}, {"head_dim": 8}, 4, "query size is 8 a rank"),
    "two layers": ({"fp8": "tensorwise"}, {"layers": 2}, 1, "the model's 2 layers are the first and the last"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case: str, engine: None) -> None:
    values, changes, tp, message = REFUSED[case]
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_layers(settings(dtype="bf16", **values), arch(**changes), tp)


def test_what_fits_is_accepted(engine: None) -> None:
    for values in ({"spec": "te"}, {"fp8": "tensorwise"}, {"fp8": "delayed"}, {"reference_fp8": "tensorwise"}):
        check_layers(settings(dtype="bf16", **values), arch(), 1)
    two = replace(arch(), layers=2)
    check_layers(settings(dtype="bf16", fp8="delayed"), two, 1)
    check_layers(settings(dtype="bf16", fp8="tensorwise", fp8_first_last_bf16=False), two, 1)


def test_without_transformer_engine(nothing: None) -> None:
    check_layers(settings(), arch(), 1)
    for values, message in (
        ({"spec": "te"}, "model.spec = te: Transformer Engine is not installed; set model.spec=auto"),
        ({"fp8": "blockwise"}, "model.fp8 = blockwise: Transformer Engine is not installed; set model.fp8=off$"),
        ({"reference_fp8": "tensorwise"}, "model.reference_fp8 = tensorwise: .* set model.reference_fp8=off$"),
    ):
        with pytest.raises(ConfigError, match=message):
            check_layers(settings(dtype="bf16", **values), arch(), 1)


def test_what_is_said(engine: None) -> None:
    told = precision.describe_layers(settings(dtype="bf16"))
    assert ENGINE.why in told and "attention over packed rows" in told
    assert "scaled_dot_product_attention" in precision.describe_layers(settings(spec="te"))  # in fp32
    local = precision.describe_layers(settings(spec="local"))
    assert local.startswith("Megatron-core local spec (model.spec = local): torch RMSNorm")
    assert precision.describe_fp8(settings()) == "policy off; reference off"
    told = precision.describe_fp8(settings(dtype="bf16", fp8="tensorwise", reference_fp8="blockwise"))
    for part in ("tensorwise (hybrid)", "first and last layer in bf16", "head in bf16", "every 50 steps", "0.1: stop"):
        assert part in told
    assert told.endswith("reference blockwise")
    assert "all layers" in precision.describe_fp8(settings(dtype="bf16", fp8="delayed"))
