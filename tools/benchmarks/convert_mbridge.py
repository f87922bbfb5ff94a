"""The same conversion by mbridge and stock Megatron: through a whole GPTModel, as one writes it with these two."""

from __future__ import annotations

import queue
import shutil
import socket
import warnings
from pathlib import Path
from typing import Any

import torch

import flowrl_mega.parallel  # noqa: F401  ("cuda" must mean "cpu" before megatron is imported)

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # of Transformer Engine and Apex being absent
    from mbridge.models import Qwen2Bridge
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from transformers import AutoConfig

# mbridge knows the norms by the names that they have under Transformer Engine.
NORMS = {
    "input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight",
    "pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight",
}


class Bridge(Qwen2Bridge):
    """mbridge's, on megatron's local layer spec instead of Transformer Engine's."""

    def _get_transformer_layer_spec(self, vp_stage: int | None = None) -> Any:
        self.has_vp_stage = True
        return get_gpt_decoder_block_spec(self.config, use_transformer_engine=False, vp_stage=vp_stage)

    def _weight_name_mapping_mcore_to_hf(self, name: str) -> list[str]:
        for local, fused in NORMS.items():
            name = name.replace(local, fused)
        return super()._weight_name_mapping_mcore_to_hf(name)


def start() -> None:
    """What both need and no clock should count: process groups."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        address = f"tcp://localhost:{free.getsockname()[1]}"
    torch.distributed.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    # Else Megatron starts a manager process for this queue, which imports the benchmark once more.
    filesystem_async._results_queue = queue.Queue()


def hf_to_megatron(hf: Path, out: Path) -> None:
    bridge, model = _model(hf)
    bridge.load_weights([model], str(hf))
    out.mkdir()
    dist_checkpointing.save(model.sharded_state_dict(), str(out), async_strategy="mcore")
    for file in hf.glob("*.json"):  # the way back needs config.json, and the index to write the same files
        shutil.copy(file, out)


def megatron_to_hf(checkpoint: Path, out: Path) -> None:
    bridge, model = _model(checkpoint)
    model.load_state_dict(dist_checkpointing.load(model.sharded_state_dict(), str(checkpoint)))
    bridge.safetensor_io = bridge._get_safetensor_io(str(checkpoint))
    with torch.no_grad():
        bridge.save_weights([model], str(out))


def _model(folder: Path) -> tuple[Bridge, GPTModel]:
    config = AutoConfig.from_pretrained(folder)
    config.rope_theta = config.rope_parameters["rope_theta"]  # where transformers had it before version 5
    bridge = Bridge(config, dtype=torch.bfloat16)
    # Fusion needs more than torch. Random weights, to be overwritten at once, would cost mbridge more than its work.
    bridge.set_extra_args(gradient_accumulation_fusion=False, perform_initialization=False)
    model = bridge._model_provider([])(pre_process=True, post_process=True)
    return bridge, model.bfloat16()  # as Megatron's Float16Module does; torch's norms are built in fp32
