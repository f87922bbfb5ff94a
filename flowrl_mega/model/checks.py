"""Refuses layouts, layers, precisions and Megatron settings that a model or this machine cannot have, before a rank
starts. Every refusal is a ConfigError that names the setting, its value and the fix."""

from __future__ import annotations

from typing import Any, Literal

from megatron.core.transformer.transformer_config import TransformerConfig

from flowrl_mega.config import ConfigError, Fp8Recipe, ModelSettings
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.precision import ALIGNMENT, first_last_bf16, layer_spec
from flowrl_mega.parallel import backends
from flowrl_mega.settings import nearest


def check_layout(arch: Architecture, tp: int, setting: str = "parallel.tp") -> None:
    """Refuse a tensor-parallel size that does not divide the model, before any rank starts."""
    for name, size in (
        ("attention heads", arch.heads),
        ("key-value heads", arch.kv_heads),
        ("feed-forward size", arch.ffn),
    ):
        if size % tp:
            fits = [n for n in range(1, arch.kv_heads + 1) if not (arch.heads % n or arch.kv_heads % n or arch.ffn % n)]
            raise ConfigError(
                f"{setting} = {tp}: does not divide the model's {size} {name}; use one of {', '.join(map(str, fits))}"
            )


def check_pipeline(arch: Architecture, pp: int, vpp: int) -> None:
    """Refuse a number of pipeline stages that does not divide the layers, before any rank starts."""
    if arch.layers % (pp * vpp) == 0:
        return
    if arch.layers % pp:
        fits = [n for n in range(1, arch.layers + 1) if arch.layers % n == 0]
        nearest_fit = min(fits, key=lambda n: (abs(n - pp), n))
        raise ConfigError(f"parallel.pp = {pp}: does not divide the model's {arch.layers} layers; use {nearest_fit}")
    fits = [n for n in range(1, arch.layers // pp + 1) if arch.layers % (pp * n) == 0]
    nearest_fit = min(fits, key=lambda n: (abs(n - vpp), n))
    raise ConfigError(
        f"parallel.vpp = {vpp}: {pp} stages have {arch.layers // pp} layers each; use {nearest_fit}, a divisor of that"
    )


OWN_FIELDS = {
    "num_layers", "hidden_size", "num_attention_heads", "num_query_groups", "kv_channels", "ffn_hidden_size",
    "tensor_model_parallel_size", "pipeline_model_parallel_size", "virtual_pipeline_model_parallel_size",
    "context_parallel_size", "variable_seq_lengths", "sequence_parallel", "normalization", "layernorm_epsilon",
    "calculate_per_token_loss",
}  # fmt: skip
FP8_FIELDS = {"fp8", "fp8_recipe", "fp8_param", "first_last_layers_bf16", "disable_parameter_transpose_cache"}


def check_megatron(settings: dict[str, Any]) -> None:
    """Refuse `megatron.*` names that TransformerConfig lacks, or that other settings rule."""
    fields = list(TransformerConfig.__dataclass_fields__)
    for name, value in settings.items():
        if name not in fields:
            raise ConfigError(f"megatron.{name}: not a field of TransformerConfig; {nearest(name, fields)}")
        if name in OWN_FIELDS:
            raise ConfigError(f"megatron.{name} = {value!r}: follows from model.path and parallel.*; leave it out")
        if name in FP8_FIELDS:
            raise ConfigError(f"megatron.{name} = {value!r}: follows from model.spec and model.fp8; leave it out")


def check_layers(model: ModelSettings, arch: Architecture, tp: int, cp: int = 1) -> None:
    """Refuse layers or a recipe that this machine or this model cannot have, before any rank starts."""
    spec, why = layer_spec(model)
    if cp > 1 and (spec == "local" or model.dtype == "fp32"):
        raise ConfigError(
            f"parallel.cp = {cp}: only Transformer Engine's attention in bf16 shares out sequences, and the layers are "
            f"{spec} ({why}), model.dtype = {model.dtype}; take parallel.cp=1 and more of parallel.tp with "
            "parallel.sequence_parallel"
        )
    engine = backends.transformer_engine()
    if model.spec == "te" and not engine.usable:
        raise ConfigError(f"model.spec = te: {engine.why}; set model.spec=auto, or run where it can be used")
    _check_recipe("fp8", model.fp8, arch, tp)
    _check_recipe("reference_fp8", model.reference_fp8, arch, tp)
    if model.fp8 != "off" and first_last_bf16(model) and arch.layers <= 2:
        raise ConfigError(
            f"model.fp8 = {model.fp8}: the model's {arch.layers} layers are the first and the last, which stay in "
            "bf16; set model.fp8_first_last_bf16=false, or model.fp8=off"
        )


def _check_recipe(field: str, recipe: Literal["off"] | Fp8Recipe, arch: Architecture, tp: int) -> None:
    if recipe == "off":
        return
    support = backends.fp8_support(recipe)
    if not support.usable:
        other = " or tensorwise" if recipe == "blockwise" and backends.fp8_support("tensorwise").usable else ""
        raise ConfigError(f"model.{field} = {recipe}: {support.why}; set model.{field}=off{other}")
    sizes = {
        "hidden size": arch.hidden,
        "query size": arch.heads * arch.head_dim // tp,
        "query, key and value size": (arch.heads + 2 * arch.kv_heads) * arch.head_dim // tp,
        "feed-forward size": arch.ffn // tp,
    }
    for name, size in sizes.items():
        if size % ALIGNMENT:
            raise ConfigError(
                f"model.{field} = {recipe}: FP8 needs sizes that {ALIGNMENT} divides, and the model's {name} is {size} "
                f"a rank at parallel.tp = {tp}; take a smaller tp, or set model.{field}=off"
            )
