"""The policy: a Megatron model with ONE forward that returns per-token log-probs, entropy and log Z."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from flowrl_mega.config import Config, LogZ
from flowrl_mega.model.architecture import Architecture
from flowrl_mega.model.critic import ValueHead
from flowrl_mega.model.partition import build_partition, prompt_mean_parts
from flowrl_mega.model.precision import reference_settings
from flowrl_mega.model.stage import Model, Stage, whole_on_every_rank
from flowrl_mega.ops import Shard, lm_head_logprob
from flowrl_mega.parallel.context import all_reduce_grad, whole_response
from flowrl_mega.parallel.layout import Layout
from flowrl_mega.parallel.packing import PackedBatch


class PolicyOutput(NamedTuple):
    """What the policy computes of one packed batch of B sequences with R response tokens. Summing over a response is
    left to the objective."""

    logp: Tensor  # [R] fp32: log pi(y_t | x, y_<t) at the rollout's temperature
    entropy: Tensor  # [R] fp32, no gradient
    log_z: Tensor | None  # [B] fp32; None where the model has no partition function
    value: Tensor | None = None  # [R] fp32, V(x, y_<t); None but with a critic that shares the trunk


class PolicyStage(Stage):
    """A run of the policy's layers; the last one has the lm-head, the partition function, a shared critic's head."""

    def __init__(
        self, arch: Architecture, config: Config, layout: Layout, log_z: LogZ | None, with_value: bool, vp_stage: int
    ) -> None:
        super().__init__(arch, config, layout, vp_stage)
        self.logits_budget_bytes, self.backend = config.model.first_logits_budget_mb << 20, config.ops.backend
        self.log_z = log_z or LogZ(kind="zero")
        self.partition: nn.Module | None = None
        self.value_head: ValueHead | None = None
        to = {"device": layout.device, "dtype": self.config.params_dtype}
        if self.post_process:
            self.partition = build_partition(self.log_z, arch.hidden, config.seed)
            if self.partition is not None:
                self.partition.to(**to)
            if with_value:
                self.value_head = ValueHead(arch.hidden).to(**to)
            for head in filter(None, (self.partition, self.value_head)):
                whole_on_every_rank(head)
        shard = arch.padded_vocab(layout.tp) // layout.tp
        start = layout.tp_rank * shard
        self.shard = Shard(start, max(0, min(shard, arch.vocab - start)), arch.vocab)

    def outputs(self, hidden: Tensor, head: Tensor | None, batch: PackedBatch, temperature: float) -> PolicyOutput:
        assert head is not None, "the last stage has the lm-head"
        found = lm_head_logprob(
            hidden,
            head,
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
        logp, entropy = (whole_response(x, batch, self.layout.cp_group) for x in (found.logp, found.entropy.detach()))
        hidden = self.computed_by_all(hidden)
        value = None
        if self.value_head is not None:
            value = whole_response(self.value_head(hidden[batch.response_rows]), batch, self.layout.cp_group)
        return PolicyOutput(logp, entropy, self._log_z(hidden, batch), value)

    def _log_z(self, hidden: Tensor, batch: PackedBatch) -> Tensor | None:
        if self.partition is None:
            return None
        if self.log_z.kind == "mlp-detached":
            hidden = hidden.detach()
        sums, tokens = prompt_mean_parts(batch, hidden, self.log_z.prompt)
        return self.partition(all_reduce_grad(sums, self.layout.cp_group) / tokens[:, None], batch)


class Policy(Model):
    """The model that is trained, or the reference.

    `log_z`: the partition function's settings, or None for an objective (or a reference) without one. `with_value`: a
    critic shares the trunk.
    """

    def __init__(
        self, arch: Architecture, config: Config, layout: Layout, log_z: LogZ | None, with_value: bool = False
    ) -> None:
        self.log_z, self.with_value = log_z, with_value
        stages = [PolicyStage(arch, config, layout, log_z, with_value, vp_stage) for vp_stage in range(layout.vpp)]
        super().__init__(arch, layout, stages)

    @property
    def partition(self) -> nn.Module | None:
        """The partition function, where this rank has it: on the last pipeline stage."""
        return self.stages[-1].partition

    @property
    def logits_budget_bytes(self) -> int:
        """Logits that the lm-head keeps for the backward pass; a setter for all of this rank's stages."""
        return self.stages[-1].logits_budget_bytes

    @logits_budget_bytes.setter
    def logits_budget_bytes(self, value: int) -> None:
        for stage in self.stages:
            stage.logits_budget_bytes = value


def build_reference(arch: Architecture, config: Config, layout: Layout) -> Policy:
    """A policy without partition function that no optimizer knows and that is only scored; loaded like the policy.
    Its precision is its own: `model.reference_fp8`.

    Its parameters still say requires_grad (`score` takes no gradient): with parameters that do not, torch multiplies
    Megatron's [T, 1, H] row by row, three times slower on CPU and rounded unlike the policy.
    """
    config = config.model_copy(update={"model": reference_settings(config.model)})
    reference = Policy(arch, config, layout, log_z=None)
    reference.train(False)
    return reference
