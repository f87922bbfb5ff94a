"""The policy: Megatron's GPTModel with ONE forward that returns per-token log-probs, entropy and log Z."""

from __future__ import annotations

import logging
from typing import Any, NamedTuple

import torch
from megatron.core.dist_checkpointing.utils import apply_prefix_mapping
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer.module import MegatronModule
from torch import Tensor

from flowrl_mega.config import Config
from flowrl_mega.model.architecture import Architecture, transformer_config
from flowrl_mega.model.layers import PackedRotary, PackedRows, local_spec
from flowrl_mega.model.partition import Kind, build_partition, prompt_mean
from flowrl_mega.ops import Shard, lm_head_logprob, share_of_gradient
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.packing import PackedBatch


class PolicyOutput(NamedTuple):
    """Of one packed batch of B sequences with R response tokens; sums over a response are the objective's affair."""

    logp: Tensor  # [R] fp32: log pi(y_t | x, y_<t) at the rollout's temperature
    entropy: Tensor  # [R] fp32, no gradient
    log_z: Tensor | None  # [B] fp32; None where there is no partition function, or log Z is fixed at 0


class Policy(MegatronModule):
    """GPTModel and the partition function under one roof, so that both are wrapped, optimised and saved together.

    Megatron 0.19 calls GPTModel deprecated in favour of HybridModel, but that has no `output_processor`, the one way to
    the last hidden states without the logits of every row.

    `log_z`: "mlp", "zero", "constant", or None for an objective (or a reference) without a partition function.
    """

    def __init__(self, arch: Architecture, config: Config, layout: Layout, log_z: Kind | None) -> None:
        transformer = transformer_config(arch, config.model, config.megatron, layout)
        super().__init__(transformer)
        self.arch, self.layout, self.log_z_kind = arch, layout, log_z
        self.logits_budget_bytes, self.backend = config.model.logits_budget_mb << 20, config.ops.backend
        self.gpt = _gpt(arch, transformer, layout)
        self.model_type = self.gpt.model_type  # Megatron's schedules ask for it
        self.partition = build_partition(log_z, arch.hidden, config.seed)
        if self.partition is not None:
            self.partition.to(device=layout.device, dtype=transformer.params_dtype)
        shard = arch.padded_vocab(layout.tp) // layout.tp
        start = layout.tp_rank * shard
        self.shard = Shard(start, max(0, min(shard, arch.vocab - start)), arch.vocab)

    def forward(self, batch: PackedBatch, temperature: float = 1.0) -> PolicyOutput:
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
            cu_seqlens=batch.response_cu_seqlens,
            temperature=temperature,
            shard=self.shard,
            group=self.layout.tp_group,
            reduce_gradient=not self.layout.sequence_parallel,
            logits_budget_bytes=self.logits_budget_bytes,
            backend=self.backend,
        )
        return PolicyOutput(head.logp, head.entropy, self._log_z(hidden, batch))

    def _log_z(self, hidden: Tensor, batch: PackedBatch) -> Tensor | None:
        if self.partition is None:
            return None
        if self.layout.sequence_parallel:
            hidden = share_of_gradient(hidden, 1 / self.layout.tp)  # each rank computes all of log Z
        return self.partition(prompt_mean(hidden, batch.prompt_rows, batch.prompt_segment, batch.prompt_lengths))

    @torch.no_grad()
    def score(self, batch: PackedBatch, temperature: float = 1.0) -> PolicyOutput:
        """Log-probs without gradient: the old policy's and the reference's."""
        return self(batch, temperature)

    def sharded_state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Under the keys of a bare GPTModel, so that whatever reads its checkpoints reads a policy's."""
        state = super().sharded_state_dict(*args, **kwargs)
        apply_prefix_mapping(state, {"gpt.": ""})
        return state

    def set_input_tensor(self, input_tensor: Any) -> None:
        """Megatron's schedules hand the previous pipeline stage's output through this."""
        self.gpt.set_input_tensor(input_tensor)


def _gpt(arch: Architecture, transformer: Any, layout: Layout) -> GPTModel:
    logging.getLogger("megatron.core.models.gpt.gpt_model").setLevel(logging.ERROR)  # its deprecation notice
    gpt = GPTModel(
        transformer,
        local_spec(transformer),
        vocab_size=arch.padded_vocab(layout.tp),
        max_sequence_length=arch.max_positions,
        share_embeddings_and_output_weights=arch.tied,
        position_embedding_type="rope",
        pg_collection=layout.groups,
    )
    gpt.rotary_pos_emb = PackedRotary(arch.inv_freq)
    return gpt.to(layout.device)


def build_reference(arch: Architecture, config: Config, layout: Layout) -> Policy:
    """A policy without partition function that no optimizer knows and that is only scored; loaded like the policy.

    Its parameters still say requires_grad (`score` takes no gradient): with parameters that do not, torch multiplies
    Megatron's [T, 1, H] row by row, three times slower on CPU and rounded unlike the policy.
    """
    reference = Policy(arch, config, layout, log_z=None)
    reference.eval()
    return reference
