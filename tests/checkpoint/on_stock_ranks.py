"""What ranks do for test_convert_stock: Megatron's own GPTModel, loaded and saved by Megatron's own functions.

Of flowrl_mega only what lets Megatron run without CUDA is used here: this is what the converter is measured against.
"""

from __future__ import annotations

import json
import logging
import queue
import warnings
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from flowrl_mega.parallel.layout import _drop_groups  # isort: skip  before megatron
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed
from megatron.core.transformer.transformer_config import TransformerConfig

for noisy in ("models.gpt.gpt_model", "dist_checkpointing"):  # deprecation notices
    logging.getLogger(f"megatron.core.{noisy}").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module=r"torch\.distributed")  # Megatron's calls of what torch deprecates
filesystem_async._results_queue = queue.Queue()  # instead of a manager process on each rank; it changes no bytes


def groups(tp: int, pp: int) -> None:
    """Megatron's groups for this layout; the other ranks are data-parallel copies."""
    if not dist.is_initialized():
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    if parallel_state.model_parallel_is_initialized():
        _drop_groups()
    parallel_state.initialize_model_parallel(tp, pp)
    model_parallel_cuda_manual_seed(0, force_reset_rng=True)


def local_block_spec(config: TransformerConfig) -> Any:
    return get_gpt_layer_local_spec(qk_layernorm=config.qk_layernorm, normalization="RMSNorm")


def fused_block_spec(config: TransformerConfig) -> Any:
    return get_gpt_layer_with_transformer_engine_spec(qk_layernorm=config.qk_layernorm)


def stock_model(folder: Path, dtype: torch.dtype, block_spec: Any = local_block_spec) -> GPTModel:
    """This rank's stage of the model that the folder's config.json describes, every parameter NaN."""
    hf = json.loads((folder / "config.json").read_text())
    tp, rope, heads = (
        parallel_state.get_tensor_model_parallel_world_size(),
        hf["rope_parameters"],
        hf["num_attention_heads"],
    )
    config = TransformerConfig(
        num_layers=hf["num_hidden_layers"],
        hidden_size=hf["hidden_size"],
        ffn_hidden_size=hf["intermediate_size"],
        num_attention_heads=heads,
        num_query_groups=hf["num_key_value_heads"],
        kv_channels=hf.get("head_dim") or hf["hidden_size"] // heads,
        add_qkv_bias=hf["model_type"] == "qwen2",
        qk_layernorm=hf["model_type"] == "qwen3",
        layernorm_epsilon=hf["rms_norm_eps"],
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=F.silu,
        add_bias_linear=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=parallel_state.get_pipeline_model_parallel_world_size(),
        params_dtype=dtype,
        pipeline_dtype=dtype,
        perform_initialization=False,
        bias_activation_fusion=False,  # this and what follows needs CUDA
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        apply_rope_fusion=False,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
    )
    model = GPTModel(
        config,
        block_spec(config),
        vocab_size=-(-hf["vocab_size"] // tp) * tp,
        max_sequence_length=hf["max_position_embeddings"],
        pre_process=parallel_state.is_pipeline_first_stage(),
        post_process=parallel_state.is_pipeline_last_stage(),
        parallel_output=False,
        share_embeddings_and_output_weights=hf["tie_word_embeddings"],
        position_embedding_type="rope",
        rotary_base=rope["rope_theta"],
        rope_scaling=rope["rope_type"] == "llama3",
    )
    for parameter in model.to(dtype).parameters():  # Megatron's Float16Module does so too; norms are made in fp32
        parameter.data.fill_(torch.nan)
    return model


def load(model: GPTModel, folder: Path) -> None:
    """As Megatron's own quick start has it."""
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(folder)))


def save(model: GPTModel, folder: Path) -> None:
    if dist.get_rank() == 0:
        folder.mkdir()
    dist.barrier()
    dist_checkpointing.save(model.sharded_state_dict(), str(folder))


def weights(model: GPTModel, vocab: int) -> dict[str, Tensor]:
    """This rank's parameters, without the rows that pad the vocabulary."""
    rank, found = parallel_state.get_tensor_model_parallel_rank(), {}
    for name, parameter in model.named_parameters():
        is_vocabulary = "word_embeddings" in name or "output_layer" in name
        found[name] = parameter.data[: vocab - rank * parameter.shape[0]] if is_vocabulary else parameter.data
    return found


@torch.no_grad()
def logits(model: GPTModel, tokens: list[int]) -> Tensor | None:
    """[tokens, padded vocabulary] computed in fp32, on the last pipeline stage."""
    model.float().config.params_dtype = model.config.pipeline_dtype = torch.float32
    if not parallel_state.is_pipeline_first_stage():
        hidden = torch.empty(len(tokens), 1, model.config.hidden_size)
        dist.recv(hidden, parallel_state.get_pipeline_model_parallel_prev_rank())
        model.set_input_tensor(hidden)
    output = model(torch.tensor([tokens]), torch.arange(len(tokens))[None], attention_mask=None)
    if parallel_state.is_pipeline_last_stage():
        return output[0]
    dist.send(output, parallel_state.get_pipeline_model_parallel_next_rank())
    return None


class Case(NamedTuple):
    """Load `loaded` with tp x pp ranks into the model of config.json in `hf`, and save it again as `saved`."""

    hf: Path
    loaded: Path
    saved: Path
    dtype: torch.dtype
    tp: int
    pp: int


class Found(NamedTuple):
    not_filled: list[str]
    logits: Tensor | None


def walk(cases: list[Case], tokens: list[int], vocab: int) -> list[Found]:
    """All cases, those of one layout after each other."""
    found, layout = [], None
    for case in cases:
        if layout != (layout := (case.tp, case.pp)):
            groups(*layout)
        model = stock_model(case.hf, case.dtype)
        load(model, case.loaded)
        save(model, case.saved)
        not_filled = [name for name, weight in weights(model, vocab).items() if weight.isnan().any()]
        found.append(Found(not_filled, logits(model, tokens)))
    _drop_groups()  # the next user of these ranks makes its own
    return found


class Change(NamedTuple):
    """One is added to one element of a Megatron parameter; the element of a Hugging Face tensor that this is."""

    name: str
    at: tuple[int, ...]
    hf_name: str
    hf_at: tuple[int, ...]


def save_changed(hf: Path, dtype: torch.dtype, loaded: Path, changes: dict[Path, Change]) -> None:
    """Load the checkpoint, and save it once for each change with nothing else changed."""
    groups(1, 1)
    for saved, change in changes.items():
        model = stock_model(hf, dtype)
        load(model, loaded)
        model.get_parameter(change.name).data[change.at] += 1
        save(model, saved)
    _drop_groups()


class Specs(NamedTuple):
    """One rank's weights and logits of one checkpoint, under Megatron's local spec and Transformer Engine's."""

    local: dict[str, Tensor]
    fused: dict[str, Tensor]
    local_logits: Tensor | None
    fused_logits: Tensor | None


def both_specs(case: Case, tokens: list[int], vocab: int) -> Specs:
    """What is saved is the model with Transformer Engine's."""
    groups(case.tp, case.pp)
    models = [stock_model(case.hf, case.dtype, spec) for spec in (local_block_spec, fused_block_spec)]
    for model in models:
        load(model, case.loaded)
    save(models[1], case.saved)
    found = Specs(*(weights(model, vocab) for model in models), *(logits(model, tokens) for model in models))
    _drop_groups()
    return found
