"""Refuses layouts, layers, precisions and Megatron settings that a model or this machine cannot have, before a rank
starts. Every refusal is a ConfigError that names the setting, its value and the fix."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal, NamedTuple, get_type_hints

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from pydantic import TypeAdapter, ValidationError

from flowrl_mega.config import Config, ConfigError, Fp8Recipe, ModelSettings, ParallelSettings
from flowrl_mega.model.architecture import Architecture, trainer_fields, transformer_config
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


class Passed(NamedTuple):
    """When Megatron reads a setting that the trainer passes on to it: the condition in words, and as a function of
    the section `megatron` and the layout."""

    needs: str
    is_read: Callable[[dict[str, Any], ParallelSettings], bool]


_FULL = Passed("megatron.recompute_granularity=full", lambda given, _: given.get("recompute_granularity") == "full")
_STAGES = Passed("parallel.pp of at least 2", lambda _, parallel: parallel.pp > 1)
# The settings of TransformerConfig that the trainer passes on. All others change nothing here, or make another model
# of it, which neither its weights nor the rollout engine would follow: refused.
PASSED_ON = {
    "recompute_granularity": Passed("", lambda *_: True),
    "recompute_method": _FULL,
    "recompute_num_layers": _FULL,
    "recompute_modules": Passed(
        "megatron.recompute_granularity=selective", lambda given, _: given.get("recompute_granularity") == "selective"
    ),
    "distribute_saved_activations": Passed(
        "megatron.recompute_granularity=full and parallel.tp of at least 2",
        lambda given, parallel: _FULL.is_read(given, parallel) and parallel.tp > 1,
    ),
    "num_layers_in_first_pipeline_stage": _STAGES,
    "num_layers_in_last_pipeline_stage": _STAGES,
    "deallocate_pipeline_outputs": _STAGES,
}
RECOMPUTE_MODULES = ("core_attn", "mlp")  # norms lie inside linear layers or are recomputed by TE only; no MoE here


def check_megatron(config: Config, arch: Architecture) -> None:
    """Refuse `megatron.*` that TransformerConfig lacks or refuses, that the trainer sets itself, or that would do
    nothing, before any rank starts."""
    given = config.megatron
    for name, value in given.items():
        _check_passed_on(name, value, config, arch)
    modules = given.get("recompute_modules") or ()
    if unknown := [module for module in modules if module not in RECOMPUTE_MODULES]:
        raise ConfigError(
            f"megatron.recompute_modules = {modules!r}: {unknown[0]!r} is nothing that these models can recompute; "
            f"take some of {', '.join(RECOMPUTE_MODULES)}"
        )
    if (layers := given.get("recompute_num_layers")) is not None and layers < 1:
        raise ConfigError(f"megatron.recompute_num_layers = {layers}: must be 1 or more")
    for end in ("first", "last"):
        name = f"num_layers_in_{end}_pipeline_stage"
        if (given.get(name) or 0) > arch.layers:  # Megatron would give the other stages a negative number
            raise ConfigError(f"megatron.{name} = {given[name]}: the model has {arch.layers} layers; take fewer")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the ranks show them
        transformer_config(arch, config.model, config.parallel, given)


def _check_passed_on(name: str, value: Any, config: Config, arch: Architecture) -> None:
    types, said = get_type_hints(TransformerConfig), f"megatron.{name} = {value!r}"
    if name not in types:
        raise ConfigError(f"megatron.{name}: not a field of TransformerConfig; {nearest(name, list(types))}")
    for origin, fields in trainer_fields(arch, config.model, config.parallel).items():
        if name in fields:
            fix = f"follows from {origin}; set that instead" if origin else f"must be {fields[name]!r}; leave it out"
            raise ConfigError(f"{said}: {fix}")
    if name not in PASSED_ON:
        raise ConfigError(
            f"{said}: changes nothing here, or makes another model of it, so the trainer does not pass it on; leave it "
            f"out. These are passed on: {', '.join(PASSED_ON)}"
        )
    try:
        TypeAdapter(types[name]).validate_python(value, strict=True)
    except ValidationError as error:
        raise ConfigError(f"{said}: {error.errors()[0]['msg']}") from None
    if value is not None and not PASSED_ON[name].is_read(config.megatron, config.parallel):
        raise ConfigError(f"{said}: is read only with {PASSED_ON[name].needs}; set that, or leave this out")


def check_head(backend: str, arch: Architecture, tp: int) -> None:
    """Refuse kernels for log-probs that cannot share out this model's vocabulary, before any rank starts."""
    if backend != "liger" or tp == 1:
        return
    if not torch.cuda.is_available():
        raise ConfigError(
            f"ops.backend = liger: with parallel.tp = {tp} Liger-Kernel takes CUDA tensors only, and there is no GPU; "
            "set ops.backend=auto, or parallel.tp=1"
        )
    if arch.vocab % tp:
        raise ConfigError(
            f"ops.backend = liger: parallel.tp = {tp} does not divide the model's vocabulary of {arch.vocab}, and "
            "Liger-Kernel pads none; set ops.backend=auto, or take another tp"
        )


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
