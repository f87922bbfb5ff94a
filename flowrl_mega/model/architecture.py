"""A model's architecture: read from a Hugging Face config.json and checked, and as Megatron's TransformerConfig."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from transformers import AutoConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from flowrl_mega.config import ConfigError, ModelSettings, ParallelSettings
from flowrl_mega.model.precision import layer_fields

SUPPORTED = ("llama", "mistral", "qwen2", "qwen3")


@dataclass(frozen=True)
class Architecture:
    """A decoder with RMSNorm, SwiGLU, grouped-query attention and rotary positions."""

    model_type: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    ffn: int
    vocab: int
    max_positions: int
    norm_eps: float
    init_std: float
    tied: bool
    qkv_bias: bool
    qk_norm: bool
    inv_freq: torch.Tensor  # [head_dim / 2] fp32, rope scaling applied

    def padded_vocab(self, tp: int) -> int:
        return -(-self.vocab // tp) * tp


def read_architecture(path: str | Path, setting: str = "model.path") -> Architecture:
    """The architecture of a Hugging Face folder; refuses what the policy would compute differently.

    `setting` is where the user said `path`.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise ConfigError(f"{setting} = {str(path)!r}: holds no config.json; give a Hugging Face model folder")
    try:
        written = dict(json.loads(file.read_text()))
        model_type = written.get("model_type")
    except (ValueError, TypeError) as error:
        raise ConfigError(f"{file}: not valid JSON ({error}); get the model folder again") from None
    if model_type not in SUPPORTED:
        raise ConfigError(f"{file}: model_type = {model_type!r} is not supported; one of {', '.join(SUPPORTED)} is")
    _refuse_numbers(written, file)
    try:
        hf = AutoConfig.from_pretrained(path)
    except Exception as error:  # transformers checks some values, each in its own way
        reason = " ".join(str(error).split())
        raise ConfigError(f"{file}: refused by transformers ({reason}); get the model folder again") from None
    _refuse_unsupported(hf, file)
    rope_type = (hf.rope_parameters or {}).get("rope_type", "default")
    head_dim = getattr(hf, "head_dim", None) or hf.hidden_size // hf.num_attention_heads
    return Architecture(
        model_type=model_type,
        layers=hf.num_hidden_layers,
        hidden=hf.hidden_size,
        heads=hf.num_attention_heads,
        kv_heads=hf.num_key_value_heads,
        head_dim=head_dim,
        ffn=hf.intermediate_size,
        vocab=hf.vocab_size,
        max_positions=hf.max_position_embeddings,
        norm_eps=hf.rms_norm_eps,
        init_std=hf.initializer_range,
        tied=hf.tie_word_embeddings,
        qkv_bias=model_type == "qwen2" or getattr(hf, "attention_bias", False),
        qk_norm=model_type == "qwen3",
        inv_freq=_inverse_frequencies(hf, rope_type, head_dim),
    )


SIZES = """num_hidden_layers hidden_size num_attention_heads num_key_value_heads head_dim intermediate_size vocab_size
    max_position_embeddings""".split()
ROPE = {  # what is read of each kind's settings
    "default": ("rope_theta",),
    "linear": ("rope_theta", "factor"),
    "llama3": ("rope_theta", "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _refuse_numbers(written: dict[str, Any], file: Path) -> None:
    """Refuse sizes below 1, and rotary settings that are no numbers above 0: transformers looks at few of them, and
    computes with the others."""
    for name in SIZES:
        if type(written.get(name)) is int and written[name] < 1:
            raise ConfigError(f"{file}: {name} = {written[name]}: must be 1 or more; get the model folder again")
    found = {"rope_theta": written["rope_theta"]} if "rope_theta" in written else {}
    for section in ("rope_scaling", "rope_parameters"):  # transformers 4's name and 5's
        given = written.get(section)
        if isinstance(given, dict):
            kind = given.get("rope_type", given.get("type", "default"))
            read = ROPE.get(kind, ()) if isinstance(kind, str) else ()
            found |= {f"{section}.{name}": given[name] for name in read if name in given}
    for name, value in found.items():
        if type(value) not in (int, float) or not 0 < value < math.inf:
            raise ConfigError(
                f"{file}: {name} = {json.dumps(value)}: must be a number above 0; write there what the model was "
                "trained with, without quotes, or get the model folder again"
            )


def _inverse_frequencies(hf: Any, rope_type: str, head_dim: int) -> torch.Tensor:
    if rope_type == "default":
        exponent = torch.arange(0, head_dim, 2, dtype=torch.float32) / head_dim
        return 1.0 / hf.rope_parameters["rope_theta"] ** exponent
    return ROPE_INIT_FUNCTIONS[rope_type](hf, "cpu")[0].float()


def _refuse_unsupported(hf: Any, file: Path) -> None:
    rope_type = (hf.rope_parameters or {}).get("rope_type", "default")
    window = getattr(hf, "sliding_window", None) if hf.model_type == "mistral" else None
    wrong = {
        "hidden_act": (hf.hidden_act, hf.hidden_act != "silu", "silu"),
        "rope_type": (rope_type, rope_type not in ("default", "linear", "llama3"), "default, linear or llama3"),
        "use_sliding_window": (True, getattr(hf, "use_sliding_window", False), "false"),
        "sliding_window": (window, window is not None and window < hf.max_position_embeddings, "null"),
        "attention_bias": (True, getattr(hf, "attention_bias", False), "false"),
        "mlp_bias": (True, getattr(hf, "mlp_bias", False), "false"),
    }
    for name, (value, bad, fix) in wrong.items():
        if bad:
            raise ConfigError(f"{file}: {name} = {value!r} is not supported; {fix} is")


def trainer_fields(arch: Architecture, model: ModelSettings, parallel: ParallelSettings) -> dict[str, dict[str, Any]]:
    """The TransformerConfig arguments that the trainer sets, under the settings that they follow from ("": under none,
    the trainer needs these values)."""
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    return {
        "model.path": dict(
            num_layers=arch.layers,
            hidden_size=arch.hidden,
            num_attention_heads=arch.heads,
            num_query_groups=arch.kv_heads,
            kv_channels=arch.head_dim,
            ffn_hidden_size=arch.ffn,
            normalization="RMSNorm",
            layernorm_epsilon=arch.norm_eps,
            init_method_std=arch.init_std,
            gated_linear_unit=True,
            activation_func=torch.nn.functional.silu,
            add_bias_linear=False,
            add_qkv_bias=arch.qkv_bias,
            qk_layernorm=arch.qk_norm,
        ),
        "model.dtype": dict(params_dtype=dtype, pipeline_dtype=dtype, bf16=model.dtype == "bf16"),
        "model.spec and model.fp8": layer_fields(model),
        "parallel.tp": dict(tensor_model_parallel_size=parallel.tp),
        "parallel.sequence_parallel": dict(sequence_parallel=parallel.sequence_parallel),
        "parallel.pp": dict(
            pipeline_model_parallel_size=parallel.pp,
            variable_seq_lengths=parallel.pp > 1,  # packed micro-batches have unlike numbers of rows
        ),
        "parallel.vpp": dict(
            virtual_pipeline_model_parallel_size=parallel.vpp if parallel.vpp > 1 else None,
            # Interleaved stages of two ranks send both ways at once to one peer: only single sends keep these apart.
            overlap_p2p_comm=parallel.vpp > 1,
            batch_p2p_comm=parallel.vpp == 1,
        ),
        "parallel.cp": dict(context_parallel_size=parallel.cp),
        "": dict(
            attention_dropout=0.0,  # dropout would make the scored policy another one than the sampled
            hidden_dropout=0.0,
            moe_token_dispatcher_type="alltoall",  # Megatron asks for it with variable lengths, also of dense models
            calculate_per_token_loss=True,  # the normaliser is ours: the number of sequences in the update
        ),
    }


def transformer_config(
    arch: Architecture, model: ModelSettings, parallel: ParallelSettings, extra: dict[str, Any]
) -> TransformerConfig:
    """Megatron's configuration of this model in this layout, with the settings of the section `megatron` (`extra`).

    ConfigError where Megatron refuses them.
    """
    values = {
        name: value for fields in trainer_fields(arch, model, parallel).values() for name, value in fields.items()
    }
    try:
        return TransformerConfig(**{**values, **extra})
    except (ValueError, TypeError, AssertionError) as error:
        raise ConfigError(
            f"megatron = {extra!r}: refused by TransformerConfig: {' '.join(str(error).split())}"
        ) from None
