"""What mbridge, a converter that others wrote, makes of the same models; its functions run in ranks, at their tp.

mbridge wants Transformer Engine. Here its models are built from megatron's local layer spec instead. The table of
names, the merging of q, k, v and of gate, up, and the cutting into shards are all mbridge's own code.
"""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import on_ranks
import torch
from megatron.core import dist_checkpointing
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from torch import Tensor
from transformers import AutoConfig

import flowrl_mega.checkpoint  # noqa: F401  it spares Megatron's saving a manager process
from flowrl_mega.config import ParallelSettings
from flowrl_mega.parallel import layout as layouts

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Transformer Engine and Apex being absent
    from mbridge.core.bridge import _MODEL_REGISTRY
    from mbridge.models import LLaMABridge

# mbridge has no Mistral; but Mistral's tensors have Llama's names, shapes and roles, and no more is asked of it here.
BRIDGES = {**_MODEL_REGISTRY, "mistral": LLaMABridge}

NORMS = {  # under the local spec, and under Transformer Engine's, which mbridge knows
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class LocalSpec:
    """Comes before one of mbridge's classes."""

    def _get_transformer_layer_spec(self: Any, vp_stage: int | None = None) -> Any:
        return get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        for local, fused in NORMS.items():
            name = name.replace(local, fused)
        return super()._weight_name_mapping_mcore_to_hf(name)  # type: ignore[misc]


def _model(hf: Path, tp: int) -> tuple[Any, GPTModel]:
    """mbridge's bridge for the model in `hf`, and a stock GPTModel with random weights."""
    layouts.init(ParallelSettings(tp=tp), seed=1)
    config = AutoConfig.from_pretrained(hf)
    config.rope_theta = config.rope_parameters["rope_theta"]  # where transformers had it before version 5
    theirs = BRIDGES[config.model_type]
    # With a copy of its table: for a tied Qwen mbridge changes the class's, and with it all later models'.
    bridge = type("Bridge", (LocalSpec, theirs), {"_DIRECT_MAPPING": dict(theirs._DIRECT_MAPPING)})(
        config, dtype=torch.float32, make_vocab_size_divisible_by=tp
    )
    bridge.set_extra_args(sequence_parallel=False, gradient_accumulation_fusion=False)  # both need more than torch
    return bridge, bridge._model_provider([])(pre_process=True, post_process=True)


def _loaded(hf: Path, tp: int) -> tuple[Any, GPTModel]:
    bridge, model = _model(hf, tp)
    bridge.load_weights([model], str(hf))
    return bridge, model


def _restored(hf: Path, checkpoint: Path, tp: int) -> tuple[Any, GPTModel]:
    bridge, model = _model(hf, tp)
    state = dist_checkpointing.load({"model": model.sharded_state_dict()}, str(checkpoint))
    model.load_state_dict(state["model"])
    return bridge, model


def _parameters(model: GPTModel, vocab: int, tp_rank: int) -> dict[str, Tensor]:
    """This rank's parameters without the rows that only pad the vocabulary."""
    found = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name in {"embedding.word_embeddings.weight", "output_layer.weight"} & found.keys():
        found[name] = found[name][: max(0, vocab - tp_rank * found[name].shape[0])]
    return found


def megatron_tensors(hf: Path, tp: int = 1) -> dict[str, Tensor]:
    """This rank's parameters of a stock GPTModel after mbridge loaded the Hugging Face folder."""
    bridge, model = _loaded(hf, tp)
    return _parameters(model, bridge.vocab_size, bridge.mpu.tp_rank)


def restored_tensors(hf: Path, checkpoint: Path, tp: int = 1) -> dict[str, Tensor]:
    """The same after Megatron loaded the checkpoint; `hf` only says what model it is."""
    bridge, model = _restored(hf, checkpoint, tp)
    return _parameters(model, bridge.vocab_size, bridge.mpu.tp_rank)


def policy_tensors(hf: Path, tp: int = 1) -> dict[str, Tensor]:
    """The same of our policy, which reads the Hugging Face folder and cuts its tensors itself."""
    policy = on_ranks.build(hf, parallel={"tp": tp})
    return _parameters(policy.stages[0].gpt, policy.arch.vocab, policy.layout.tp_rank)


def hf_tensors(hf: Path, checkpoint: Path, tp: int = 1) -> dict[str, Tensor]:
    """What mbridge exports after Megatron loaded the checkpoint; `hf` only says what model it is."""
    bridge, model = _restored(hf, checkpoint, tp)
    return {name: tensor.detach().clone() for name, tensor in bridge.export_weights([model])}


def save(hf: Path, checkpoint: Path, tp: int = 1) -> None:
    """What mbridge loaded, saved by Megatron, with the files beside the weights that our converter asks for."""
    _, model = _loaded(hf, tp)
    checkpoint.mkdir(exist_ok=True)
    dist_checkpointing.save({"model": model.sharded_state_dict()}, str(checkpoint), async_strategy="mcore")
    for file in hf.iterdir():
        if file.suffix != ".safetensors":
            shutil.copy(file, checkpoint)
