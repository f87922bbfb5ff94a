"""A Megatron model in packed rows: what policy and critic share, all but the heads."""

from __future__ import annotations

import logging
import re
from abc import abstractmethod
from collections.abc import Iterator
from typing import Any

import torch
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from megatron.core.transformer.utils import ensure_metadata_has_dp_cp_group
from torch import Tensor, nn

from flowrl_mega.config import Config
from flowrl_mega.model.architecture import Architecture, transformer_config
from flowrl_mega.model.layers import PackedRotary, PackedRows, local_spec
from flowrl_mega.model.precision import layer_spec
from flowrl_mega.model.te import te_spec
from flowrl_mega.ops import scale_grad
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.offload import Offload
from flowrl_mega.parallel.packing import PackedBatch
from flowrl_mega.parallel.schedule import forward_only


class Stage(MegatronModule):
    """A run of layers. The first stage has the embedding; the last one the heads, which a subclass brings.

    `vp_stage` counts this rank's stages, of which an interleaved schedule (`parallel.vpp`) has several.

    Megatron 0.19 calls GPTModel deprecated in favour of HybridModel, but that has no `output_processor`, the one way to
    the last hidden states without the logits of every row.
    """

    lm_head = True  # whether the last stage has one

    def __init__(self, arch: Architecture, config: Config, layout: Layout, vp_stage: int) -> None:
        transformer = transformer_config(arch, config.model, config.parallel, config.megatron)
        super().__init__(transformer)
        self.arch, self.layout = arch, layout
        self.pre_process = layout.pp_rank == 0 and vp_stage == 0
        self.post_process = layout.is_last_stage and vp_stage == layout.vpp - 1
        interleaved = vp_stage if layout.vpp > 1 else None  # Megatron numbers the stages of that schedule only
        self.first_layer = get_transformer_layer_offset(transformer, interleaved, layout.pp_rank)
        spec = te_spec if layer_spec(config.model)[0] == "te" else local_spec
        # Megatron's schedules ask for these two.
        self.share_embeddings_and_output_weights = arch.tied and self.lm_head
        self.gpt = self._gpt(spec(transformer, interleaved), interleaved)
        self.model_type = self.gpt.model_type

    def _gpt(self, spec: Any, vp_stage: int | None) -> GPTModel:
        logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # its deprecation notice
        arch = self.arch
        gpt = (GPTModel if self.lm_head else Headless)(
            self.config,
            spec,
            vocab_size=arch.padded_vocab(self.layout.tp),
            max_sequence_length=arch.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=self.share_embeddings_and_output_weights,
            position_embedding_type="rope",
            pg_collection=self.layout.groups,
            vp_stage=vp_stage,
        )
        gpt.rotary_pos_emb = PackedRotary(arch.inv_freq)
        return gpt.to(self.layout.device)

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> Any:
        """The last stage's outputs; the hidden states [T, 1, H] ([T / tp, 1, H] under SP) of every other one."""
        return self.gpt(
            input_ids=batch.tokens[None],
            position_ids=batch.position_ids[None],
            attention_mask=None,
            packed_seq_params=PackedRows.of(batch),
            output_processor=self._outputs,
            output_processor_context=(batch, temperature),
        )

    def _outputs(
        self, hidden_states: Tensor, output_layer: Any, output_weight: Tensor | None, context: Any, **_: Any
    ) -> Any:
        """hidden_states [T, 1, H] after the final norm, or [T / tp, 1, H] under sequence parallelism."""
        if self.layout.sequence_parallel:
            # Its backward is one reduce-scatter of what the ranks' shards of the vocabulary give.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        if output_weight is None and output_layer is not None:
            output_weight = output_layer.weight
        return self.outputs(hidden_states.squeeze(1), output_weight, *context)

    @abstractmethod
    def outputs(self, hidden: Tensor, head: Tensor | None, batch: PackedBatch, temperature: float) -> Any:
        """The heads' outputs of this rank's rows: hidden [T, H], the same on all tensor-parallel ranks; `head` is the
        rank's shard [V', H] of the lm-head."""

    def computed_by_all(self, hidden: Tensor) -> Tensor:
        """The hidden states for a head that every tensor-parallel rank computes whole, not a shard of it."""
        return scale_grad(hidden, 1 / self.layout.tp) if self.layout.sequence_parallel else hidden

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Megatron's sharded tensors without the prefix "gpt.", so that checkpoints load as a stock GPTModel's."""
        state = super().sharded_state_dict(*args, **kwargs)
        apply_prefix_mapping(state, {"gpt.": ""})
        return state

    def shared_embedding_or_output_weight(self) -> Tensor:
        """The rank's shard [V', H] of a tied embedding, which first and last stage both hold: Megatron adds up the two
        gradients."""
        return self.gpt.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand the previous stage's output through this."""
        self.gpt.set_input_tensor(input_tensor)


def whole_on_every_rank(head: nn.Module) -> None:
    """Of a head that every tensor-parallel rank computes whole: its gradients are averaged over them (schedule.py)."""
    for parameter in head.parameters():
        parameter.computed_by_all = True  # type: ignore[attr-defined]


class Headless(GPTModel):
    """A GPTModel that has no lm-head."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if self.post_process:
            self.output_layer = None

    def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> dict[str, Any]:
        """Skips LanguageModule's own, which looks after the lm-head alone."""
        return super(LanguageModule, self).sharded_state_dict(
            prefix, sharded_offsets, ensure_metadata_has_dp_cp_group(metadata)
        )


class Model:
    """This rank's pipeline stages (one, or `parallel.vpp` that take turns), and what they share."""

    def __init__(self, arch: Architecture, layout: Layout, stages: list[Any]) -> None:
        self.arch, self.layout, self.stages = arch, layout, stages

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's "gpt...." and those of its heads, layers counted over the whole model.

        The last of several stages has a copy of a tied embedding as its lm-head; that is left out.
        """
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                if parameter is not self.tied_head():
                    yield _renumbered(name, stage.first_layer), parameter

    def tied_head(self) -> nn.Parameter | None:
        """The copy of the embedding that is this rank's lm-head, where the embedding itself is another stage's."""
        last = self.stages[-1]
        separate = last.share_embeddings_and_output_weights and last.post_process and not last.pre_process
        return last.gpt.output_layer.weight if separate else None

    def gpt_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the transformer, under GPTModel's names."""
        return {name.removeprefix("gpt."): p for name, p in self.named_parameters() if name.startswith("gpt.")}

    @torch.no_grad()
    def score(self, batches: list[PackedBatch], temperature: float = 1.0) -> list[Any]:
        """Outputs without gradient (the old policy's, the reference's), by micro-batch; [] but on the last stage."""
        return forward_only(self.stages, batches, lambda stage, batch: stage(batch, temperature))

    def sharded_state_dict(self) -> dict[str, Any]:
        """This rank's sharded tensors for Megatron's checkpoints, by virtual stage."""
        return {str(vp_stage): stage.sharded_state_dict() for vp_stage, stage in enumerate(self.stages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for vp_stage, stage in enumerate(self.stages):
            stage.load_state_dict(state[str(vp_stage)])

    def offload(self) -> Offload:
        """A context in which the weights are on the device; from now on they are in CPU memory outside."""
        return Offload(lambda: [parameter for stage in self.stages for parameter in stage.parameters()])

    def train(self, mode: bool = True) -> Model:
        for stage in self.stages:
            stage.train(mode)
        return self


def _renumbered(name: str, first_layer: int) -> str:
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda number: str(int(number[0]) + first_layer), name)
