"""Which layers the model has (`model.spec`), and what `model.fp8` means for Megatron.

Nothing here imports Transformer Engine: the choice is made, and told, before a rank starts. `checks` refuses what a
machine or a model cannot have.
"""

from __future__ import annotations

from typing import Any, Literal

from flowrl_mega.config import Fp8Recipe, ModelSettings
from flowrl_mega.parallel import backends

BLOCK = 128  # values that share a scale in the blockwise recipe
ALIGNMENT = 16  # FP8 GEMMs read 16 values at a time: Transformer Engine refuses other sizes

# hybrid: e4m3 forward, e5m2 for gradients. Blocks have scales of their own and do not need the range of e5m2.
RECIPES: dict[Fp8Recipe, dict[str, Any]] = {
    # The largest value of 1024 forwards: what the paper behind it uses. Scales are shared by the ranks of one replica
    # only: data-parallel ranks may have unequal numbers of micro-batches, and would wait for each other for ever.
    "delayed": dict(fp8="hybrid", fp8_amax_history_len=1024, fp8_amax_compute_algo="max", tp_only_amax_red=True),
    "tensorwise": dict(fp8="hybrid"),
    "blockwise": dict(fp8="e4m3"),
}


def layer_spec(model: ModelSettings) -> tuple[Literal["local", "te"], str]:
    """Whose layers, and why, in words. fp32 is a choice of precision: auto does not make TF32 of it."""
    engine = backends.transformer_engine()
    if model.spec == "local":
        return "local", "model.spec = local"
    if not engine.usable:
        return "local", engine.why
    if model.spec == "auto" and model.dtype == "fp32":
        return "local", "model.dtype = fp32, which Transformer Engine multiplies in TF32"
    return "te", engine.why


def first_last_bf16(model: ModelSettings) -> bool:
    """Whether the first and the last layer stay in bf16, where the rest is in FP8."""
    return model.fp8 != "delayed" if model.fp8_first_last_bf16 is None else model.fp8_first_last_bf16


def layer_fields(model: ModelSettings) -> dict[str, Any]:
    """TransformerConfig's fields that follow from the layers and the recipe.

    gradient_accumulation_fusion stays off here: set, Megatron's own output layer asks for an extension of Apex even
    where all other layers are Transformer Engine's. `wrap` switches it on layer by layer.
    """
    te = layer_spec(model)[0] == "te"
    fields: dict[str, Any] = dict(
        bias_activation_fusion=te,  # SwiGLU in one kernel
        bias_dropout_fusion=te,
        apply_rope_fusion=te,  # in the format sbhd it takes an angle for each row, and computes in fp32
        masked_softmax_fusion=False,  # of Megatron's own attention, which neither has
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        # Weights would be quantised at the first micro-batch of an update only. But the policy is also scored between
        # updates, where Megatron's schedule does not announce a first micro-batch: that would be with stale weights.
        disable_parameter_transpose_cache=te,
    )
    if model.fp8 == "off":
        return fields | dict(fp8=None, fp8_recipe="delayed", first_last_layers_bf16=False, fp8_param=False)
    fields |= dict(fp8_recipe=model.fp8, first_last_layers_bf16=first_last_bf16(model), fp8_param=model.fp8_params)
    return fields | RECIPES[model.fp8]


def reference_settings(model: ModelSettings) -> ModelSettings:
    """The reference's own precision. Its weights stay as they are: no optimizer knows them."""
    return model.model_copy(update={"fp8": model.reference_fp8, "fp8_params": False})


def row_alignment(model: ModelSettings, sequence_parallel: bool) -> int:
    """A rank's rows of a micro-batch are padded to a multiple of this: 16 where policy or reference compute in FP8.

    128 for blocks under sequence parallelism: else Transformer Engine gathers in bf16 and quantizes again.
    """
    recipes = {model.fp8, model.reference_fp8} - {"off"}
    if "blockwise" in recipes and sequence_parallel:
        return BLOCK
    return ALIGNMENT if recipes else 1


def describe_layers(model: ModelSettings) -> str:
    """The layers, their attention and their norm, in words."""
    spec, why = layer_spec(model)
    if spec == "te":
        attention = "its attention over packed rows" if model.dtype == "bf16" else f"{SDPA} (fp32)"
        return f"Transformer Engine ({why}): norms inside its linear layers, {attention}"
    norm = backends.apex_norm()
    return f"Megatron-core local spec ({why}): {norm.why if norm.usable else 'torch RMSNorm'}, {SDPA}"


SDPA = "packed attention through scaled_dot_product_attention"


def describe_fp8(model: ModelSettings) -> str:
    """What runs in FP8, in words."""
    if model.fp8 == "off":
        policy = "off"
    else:
        weights = "weights kept in FP8" if model.fp8_params else "weights kept in bf16"
        ends = "first and last layer in bf16" if first_last_bf16(model) else "all layers"
        checks = f"every {model.fp8_check_every} steps" if model.fp8_check_every else "at the start"
        policy = (
            f"{model.fp8} ({RECIPES[model.fp8]['fp8']}), {ends}, head in bf16, {weights}; compared with bf16 {checks}, "
            f"beyond {model.fp8_budget:g}: {model.fp8_action}"
        )
    return f"policy {policy}; reference {model.reference_fp8}"
