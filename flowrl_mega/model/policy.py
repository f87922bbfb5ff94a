"""The policy: Megatron's GPTModel with ONE forward that returns per-token log-probs, entropy and log Z."""

from __future__ import annotations

import logging
import re
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from flowrl_mega.config import Config
from flowrl_mega.model.architecture import Architecture, transformer_config
from flowrl_mega.model.fp8 import layer_spec, reference_settings
from flowrl_mega.model.layers import PackedRotary, PackedRows, local_spec
from flowrl_mega.model.partition import Kind, build_partition, prompt_sum
from flowrl_mega.model.te import te_spec
from flowrl_mega.ops import Shard, lm_head_logprob, share_of_gradient
from flowrl_mega.parallel.context import total, whole_response
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.offload import Offload
from flowrl_mega.parallel.packing import PackedBatch
from flowrl_mega.parallel.schedule import forward_only


class PolicyOutput(NamedTuple):
    """Of one packed batch of B sequences with R response tokens; sums over a response are the objective's affair."""

    logp: Tensor  # [R] fp32: log pi(y_t | x, y_<t) at the rollout's temperature
    entropy: Tensor  # [R] fp32, no gradient
    log_z: Tensor | None  # [B] fp32; None where there is no partition function, or log Z is fixed at 0


class Stage(MegatronModule):
    """A run of layers. The first stage has the embedding; the last one the lm-head and the partition function.

    Megatron 0.19 calls GPTModel deprecated in favour of HybridModel, but that has no `output_processor`, the one way to
    the last hidden states without the logits of every row.
    """

    def __init__(self, arch: Architecture, config: Config, layout: Layout, log_z: Kind | None, piece: int) -> None:
        transformer = transformer_config(arch, config.model, config.megatron, layout)
        super().__init__(transformer)
        self.layout = layout
        self.logits_budget_bytes, self.backend = config.model.logits_budget_mb << 20, config.ops.backend
        self.pre_process = layout.pp_rank == 0 and piece == 0
        self.post_process = layout.is_last_stage and piece == layout.vpp - 1
        vp_stage = piece if layout.vpp > 1 else None
        self.first_layer = get_transformer_layer_offset(transformer, vp_stage, layout.pp_rank)
        spec = te_spec if layer_spec(config.model)[0] == "te" else local_spec
        self.gpt = self._gpt(arch, spec(transformer, vp_stage), vp_stage)
        self.model_type = self.gpt.model_type  # Megatron's schedules ask for these two
        self.share_embeddings_and_output_weights = arch.tied
        self.partition = build_partition(log_z, arch.hidden, config.seed) if self.post_process else None
        if self.partition is not None:
            self.partition.to(device=layout.device, dtype=transformer.params_dtype)
        shard = arch.padded_vocab(layout.tp) // layout.tp
        start = layout.tp_rank * shard
        self.shard = Shard(start, max(0, min(shard, arch.vocab - start)), arch.vocab)

    def _gpt(self, arch: Architecture, spec: Any, vp_stage: int | None) -> GPTModel:
        logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # its deprecation notice
        gpt = GPTModel(
            self.config,
            spec,
            vocab_size=arch.padded_vocab(self.layout.tp),
            max_sequence_length=arch.max_positions,
            pre_process=self.pre_process,
            post_process=self.post_process,
            share_embeddings_and_output_weights=arch.tied,
            position_embedding_type="rope",
            pg_collection=self.layout.groups,
            vp_stage=vp_stage,
        )
        gpt.rotary_pos_emb = PackedRotary(arch.inv_freq)
        return gpt.to(self.layout.device)

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> PolicyOutput | Tensor:
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
    ) -> PolicyOutput:
        """hidden_states [T, 1, H] after the final norm, or [T / tp, 1, H] under sequence parallelism."""
        batch, temperature = context
        if self.layout.sequence_parallel:
            # Its backward is one reduce-scatter of what the ranks' shards of the vocabulary give.
            hidden_states = gather_from_sequence_parallel_region(hidden_states, tensor_parallel_output_grad=True)
        hidden = hidden_states.squeeze(1)
        weight = output_layer.weight if output_weight is None else output_weight
        head = lm_head_logprob(
            hidden,
            weight,
            batch.target,
            rows=batch.response_rows,
            cu_seqlens=batch.response_cu_seqlens if self.layout.cp == 1 else None,
            temperature=temperature,
            shard=self.shard,
            group=self.layout.tp_group,
            reduce_gradient=not self.layout.sequence_parallel,
            logits_budget_bytes=self.logits_budget_bytes,
            backend=self.backend,
        )
        logp, entropy = (whole_response(x, batch, self.layout.cp_group) for x in (head.logp, head.entropy))
        return PolicyOutput(logp, entropy, self._log_z(hidden, batch))

    def _log_z(self, hidden: Tensor, batch: PackedBatch) -> Tensor | None:
        if self.partition is None:
            return None
        if self.layout.sequence_parallel:
            hidden = share_of_gradient(hidden, 1 / self.layout.tp)  # each rank computes all of log Z
        sums = prompt_sum(hidden, batch.prompt_rows, batch.prompt_segment, batch.size)
        return self.partition(total(sums, self.layout.cp_group) / batch.prompt_lengths[:, None])

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Under the keys of a bare GPTModel, so that whatever reads its checkpoints reads a policy's."""
        state = super().sharded_state_dict(*args, **kwargs)
        apply_prefix_mapping(state, {"gpt.": ""})
        return state

    def shared_embedding_or_output_weight(self) -> Tensor:
        """What first and last stage both hold of a tied model: Megatron adds up the two gradients."""
        return self.gpt.shared_embedding_or_output_weight()

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand the previous stage's output through this."""
        self.gpt.set_input_tensor(input_tensor)


class Policy:
    """The model: this rank's pipeline stages (one, or `parallel.vpp` that take turns), and what they share.

    `log_z`: "mlp", "zero", "constant", or None for an objective (or a reference) without a partition function.
    """

    def __init__(self, arch: Architecture, config: Config, layout: Layout, log_z: Kind | None) -> None:
        self.arch, self.layout, self.log_z_kind = arch, layout, log_z
        self.stages = [Stage(arch, config, layout, log_z, piece) for piece in range(layout.vpp)]

    @property
    def partition(self) -> nn.Module | None:
        """The partition function, where this rank has it: on the last pipeline stage."""
        return self.stages[-1].partition

    def named_parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """This rank's "gpt...." and "partition....", layers counted over the whole model.

        The last of several stages has a copy of a tied embedding as its lm-head; that is left out.
        """
        for stage in self.stages:
            for name, parameter in stage.named_parameters():
                if parameter is not self.tied_head():
                    yield _renumbered(name, stage.first_layer), parameter

    def tied_head(self) -> nn.Parameter | None:
        """The copy of the embedding that is this rank's lm-head, where the embedding itself is another stage's."""
        last = self.stages[-1]
        separate = self.arch.tied and last.post_process and not last.pre_process
        return last.gpt.output_layer.weight if separate else None

    def gpt_parameters(self) -> dict[str, nn.Parameter]:
        """Those of the transformer, under GPTModel's names."""
        return {name.removeprefix("gpt."): p for name, p in self.named_parameters() if name.startswith("gpt.")}

    @torch.no_grad()
    def score(self, batches: list[PackedBatch], temperature: float = 1.0) -> list[PolicyOutput]:
        """Outputs without gradient (the old policy's, the reference's), by micro-batch; [] but on the last stage."""
        return forward_only(self.stages, batches, lambda stage, batch: stage(batch, temperature))

    def sharded_state_dict(self) -> dict[str, Any]:
        """What Megatron's checkpoints hold of this rank, by stage."""
        return {str(piece): stage.sharded_state_dict() for piece, stage in enumerate(self.stages)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        for piece, stage in enumerate(self.stages):
            stage.load_state_dict(state[str(piece)])

    def offload(self) -> Offload:
        """A context in which the weights are on the device; from now on they are in CPU memory outside."""
        return Offload(lambda: [parameter for stage in self.stages for parameter in stage.parameters()])

    def train(self, mode: bool = True) -> Policy:
        for stage in self.stages:
            stage.train(mode)
        return self


def _renumbered(name: str, first_layer: int) -> str:
    return re.sub(r"(?<=decoder\.layers\.)\d+", lambda number: str(int(number[0]) + first_layer), name)


def build_reference(arch: Architecture, config: Config, layout: Layout) -> Policy:
    """A policy without partition function that no optimizer knows and that is only scored; loaded like the policy.
    Its precision is its own: `model.reference_fp8`.

    Its parameters still say requires_grad (`score` takes no gradient): with parameters that do not, torch multiplies
    Megatron's [T, 1, H] row by row, three times slower on CPU and rounded unlike the policy.
    """
    config = config.model_copy(update={"model": reference_settings(config.model)})
    return Policy(arch, config, layout, log_z=None).train(False)
