"""Megatron's data-parallel wrapper, optimizer and learning-rate schedule, and one safe update."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.dist_checkpointing.mapping import LocalNonpersistentObject
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer, get_standard_config_overrides
from megatron.core.optimizer.clip_grads import clip_grad_by_total_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from torch import Tensor

from flowrl_mega.config import ConfigError, OptimizerSettings
from flowrl_mega.metrics import Max, Mean
from flowrl_mega.parallel import backends
from flowrl_mega.parallel.offload import Offload

# Of Megatron's layouts of shared moments, that in which each tensor has name and shape of a whole one.
RESHARDABLE = "fully_reshardable"


def decided(settings: OptimizerSettings, copies: int, fp8_params: bool = False) -> OptimizerSettings:
    """With yes or no for `distributed: auto`: whether it is possible and `copies` of the weights, on so many ranks,
    have moments to share; FP8 weights alone need it always."""
    if settings.distributed != "auto":
        return settings
    shares = fp8_params or (copies > 1 and not settings.offload and backends.transformer_engine().usable)
    return settings.model_copy(update={"distributed": shares})


def check_optimizer(settings: OptimizerSettings, section: str = "optimizer") -> None:
    """Refuse what the machine's Adam cannot do, before any rank starts.

    Megatron's distributed optimizer keeps one `step` for all the parameters that share a buffer, as FusedAdam does.
    torch's AdamW counts by parameter: there a resumed run goes wrong without a word.
    """
    engine = backends.transformer_engine()
    if settings.shares and not engine.usable:
        raise ConfigError(
            f"{section}.distributed = True: needs Transformer Engine's FusedAdam ({engine.why}); with torch's AdamW a "
            f"resumed run would be silently wrong. Set {section}.distributed=false"
        )
    if settings.shares and settings.offload:
        raise ConfigError(
            f"{section}.offload = True: moves whole moments, and {section}.distributed = True keeps them in shared "
            "buffers; set one of the two to false"
        )


def wrap(stages: list[Any], distributed: bool = False, overlap: bool = False) -> list[DistributedDataParallel]:
    """A rank's pipeline stages, each with one fp32 gradient buffer, summed over data-parallel ranks once an update.

    `distributed`: as `OptimizerSettings.shares`; each rank then gets the sums of its share alone. `overlap`: as
    `ParallelSettings.overlap_grad_reduce`; the buffer of a rank's first stage comes in buckets, the others' whole, as
    Megatron's own training has it: their sums fill the pipeline's bubble.
    """
    config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        use_distributed_optimizer=distributed,
        overlap_grad_reduce=overlap and parallel_state.get_data_parallel_world_size(with_context_parallel=True) > 1,
        fp8_param_gather=bool(stages[0].config.fp8_param),
    )
    wrapped = [
        DistributedDataParallel(stage.config, config, stage, disable_bucketing=number > 0)
        for number, stage in enumerate(stages)
    ]
    for stage in wrapped:
        _fuse_gradient_accumulation(stage)
    return wrapped


def _fuse_gradient_accumulation(model: Any) -> None:
    """Weight gradients are added to the buffer by the GEMM that makes them: always by Transformer Engine's layers, by
    Megatron's own where Apex has the kernel for it. Only here, since without the buffer they would have no place."""
    of_megatron = backends.weight_gradient_extension()
    for module in model.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True
        elif of_megatron and hasattr(module, "gradient_accumulation_fusion"):
            module.gradient_accumulation_fusion = True


class Optimizer:
    """AdamW behind Megatron's optimizer, with warm-up and decay of the rates; non-finite updates are skipped.

    `total_updates`: after how many updates a decay ends. `rates`: learning rates of other parameters than log Z's that
    are not the rest's, by pattern of their name. `updates` counts those that were made, `skipped` those refused for a
    non-finite loss or gradient, `in_a_row` those of them since the last that was made.
    """

    def __init__(
        self,
        model: list[DistributedDataParallel],
        settings: OptimizerSettings,
        bf16: bool,
        total_updates: int,
        rates: dict[str, float] | None = None,
    ) -> None:
        self.model, self.settings, self.bf16 = model, settings, bf16
        lowest = 1.0 if settings.decay == "constant" else 0.0  # of each rate
        config = OptimizerConfig(
            optimizer="adam",
            lr=settings.lr,
            min_lr=lowest * settings.lr,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.betas[0],
            adam_beta2=settings.betas[1],
            adam_eps=settings.eps,
            clip_grad=settings.clip_grad,
            bf16=bf16,
            params_dtype=torch.bfloat16 if bf16 else torch.float32,
            use_distributed_optimizer=settings.shares,
        )
        overrides = get_standard_config_overrides(config)
        for pattern, rate in {"*partition.*": settings.log_z_lr, **(rates or {})}.items():
            if rate not in (None, settings.lr):  # a checkpoint tells parameter groups apart by their rates
                overrides[ParamKey(name=pattern)] = {"max_lr": rate, "min_lr": lowest * rate}
        self.inner = get_megatron_optimizer(config, model, config_overrides=overrides)
        self.schedule = OptimizerParamScheduler(
            self.inner,
            init_lr=0.0,
            max_lr=settings.lr,
            min_lr=lowest * settings.lr,
            lr_warmup_steps=settings.warmup_steps,
            lr_decay_steps=max(total_updates, settings.warmup_steps + 1),  # read only by a decay
            lr_decay_style=settings.decay,
            start_wd=settings.weight_decay,
            end_wd=settings.weight_decay,
            wd_incr_steps=1,
            wd_incr_style="constant",
        )
        self.updates = self.skipped = self.in_a_row = 0
        self.offload = Offload(self._state) if settings.offload else None

    def on_device(self) -> AbstractContextManager[Any]:
        """Inside, what `optimizer.offload` keeps in CPU memory is where it is computed with."""
        return self.offload or nullcontext()

    def _state(self) -> Iterator[Tensor]:
        """Moments, and the fp32 weights beside bf16 ones: what no forward or backward reads."""
        own = {id(parameter) for stage in self.model for parameter in stage.parameters()}
        for chained in self.inner.chained_optimizers:
            yield from (p for group in chained.param_groups for p in group["params"] if id(p) not in own)
            for moments in chained.optimizer.state.values():
                yield from (value for value in moments.values() if torch.is_tensor(value) and value.dim() > 0)

    def sharded_state_dict(self, model: dict[str, Any], is_loading: bool) -> dict[str, Any]:
        """For a checkpoint that any layout can load, and that is the same with shared moments and with whole ones.
        Collective."""
        if not self.settings.shares:
            return self.inner.sharded_state_dict(model, is_loading=is_loading)
        metadata = {"distrib_optim_sharding_type": RESHARDABLE}
        state = self.inner.sharded_state_dict(model, is_loading=is_loading, metadata=metadata)
        (inner,) = self.inner.chained_optimizers
        parameters = [parameter for buffer in inner.buffers for parameter in buffer.param_index_map]
        for parameter, tensors in zip(parameters, state["param_state"].values(), strict=True):
            if self.bf16:  # the masters, which have another name in Megatron's other optimizer
                tensors["param"].key = tensors["param"].key.replace(".state.param.", ".state.fp32_param.", 1)
            else:  # the weights are their own masters, and saved already
                tensors["param"] = LocalNonpersistentObject(parameter)
        if not self.bf16:  # there, too, it has no level for what is beside the masters
            state |= state.pop("optimizer")
        return state

    def adapt(self, saved: dict[str, Any]) -> None:
        """Make an optimizer's state, as a checkpoint holds it, one of this optimizer's: torch's AdamW keeps the count
        of updates beside the moments, Transformer Engine's and Apex's in the parameter groups, each among settings of
        its own. Shared moments lie beside the groups, whole ones beneath them, which the load has seen to."""
        adam = saved.get("optimizer", saved)  # one level down where bf16 weights have masters
        groups, beside = adam["param_groups"], adam.setdefault("state", {})
        counts = [beside.pop("common_step", None), *(group.pop("step", None) for group in groups)]
        count = max((int(count) for count in counts if count is not None), default=0)  # all are equal
        for group, own in zip(groups, self.inner.param_groups, strict=True):
            group.update({name: own[name] for name in own.keys() - group.keys()})
        if self.settings.shares:
            saved.update(optimizer={"param_groups": groups}, param_state_sharding_type=RESHARDABLE)
        if isinstance(self.inner.chained_optimizers[0].optimizer, torch.optim.Adam):
            beside["common_step"] = torch.tensor(float(count))
        else:
            for group in groups:
                group["step"] = count

    def zero_grad(self) -> None:
        for stage in self.model:
            stage.zero_grad_buffer()
        self.inner.zero_grad()

    def step(self, loss_is_finite: bool) -> dict[str, Mean | Max]:
        """Clip and apply the gradients in the buffer, unless loss or gradient norm is not finite."""
        with self.on_device():
            return self._step(loss_is_finite)

    def _step(self, loss_is_finite: bool) -> dict[str, Mean | Max]:
        found_inf = self.inner.prepare_grads()
        norm = float(self.inner.get_grad_norm())
        if found_inf or not loss_is_finite or not math.isfinite(norm):
            self.skipped += 1
            self.in_a_row += 1
            return self._report(norm)
        if self.settings.clip_grad > 0:
            clip_grad_by_total_norm_fp32(self.inner.get_parameters(), self.settings.clip_grad, norm)
        self.schedule.step(increment=1)
        self.inner.step_with_ready_grads()
        self.updates += 1
        self.in_a_row = 0
        return {**self._report(norm), "lr": Mean(self.inner.param_groups[0]["lr"])}

    def _report(self, norm: float) -> dict[str, Mean | Max]:
        """What is told of each update, `norm` being that of its gradient before it is clipped."""
        largest = math.inf if math.isnan(norm) else norm  # so that it is larger than any other
        return {"grad_norm": Mean(norm), "max_grad_norm": Max(largest), "skipped_updates": Max(self.skipped)}
