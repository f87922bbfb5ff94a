"""The gate for FP8: the same batch through the same weights in bf16 and in FP8, and what to do when they differ.

What is judged is the residual, log Z + log pi(y|x) / |y| - beta r_hat - log pi_ref(y|x) / |y|: reward and reference are
the same in both, so its difference is that of log Z + log pi(y|x) / |y|, in nats a token. (Without length
normalisation, log Z + log pi(y|x), in nats an answer.) That is what the loss squares, whatever the length of answers,
and for objectives without log Z it is the drift of a token's mean log-prob. The default budget, 0.1, is to tell a
broken recipe from a sound one: emulated on a CPU with a real model of 135M parameters, tensorwise and blockwise came to
0.05 and 0.07, and two bits in place of e4m3's three to 0.16 (tools/benchmarks/fp8_emulated.py). On a GPU nothing has
been measured yet.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.config import ModelSettings, RunError
from flowrl_mega.model.policy import Policy, PolicyOutput
from flowrl_mega.parallel.packing import PackedBatch
from flowrl_mega.parallel.schedule import forward_only

METRICS = ("fp8/sum_logp_diff", "fp8/residual_diff", "fp8/log_z_diff")  # means over sequences of |FP8 - bf16|, in nats


def differences(bf16: PolicyOutput, fp8: PolicyOutput, cu_seqlens: Tensor, length_norm: bool = True) -> Tensor:
    """The METRICS summed over B sequences, and B: [4] float64, so that ranks can add theirs up.

    cu_seqlens [B + 1]: where the response tokens of each sequence begin in `logp` [R].
    """
    drift = (fp8.logp.double() - bf16.logp.double()).cumsum(0)
    sum_logp = torch.cat([drift.new_zeros(1), drift])[cu_seqlens].diff()
    log_z = torch.zeros_like(sum_logp)
    if bf16.log_z is not None and fp8.log_z is not None:
        log_z = fp8.log_z.double() - bf16.log_z.double()
    delta = log_z + sum_logp / (cu_seqlens.diff() if length_norm else 1)
    return torch.stack([sum_logp, delta, log_z, torch.ones_like(delta)]).abs().sum(1)


def _configs(policy: Policy) -> list[Any]:
    """Megatron's configurations in the policy, each once. Whether to enter FP8, layers ask theirs at each forward."""
    modules = [module for stage in policy.stages for module in stage.modules()]
    return list({id(module.config): module.config for module in modules if hasattr(module, "config")}.values())


@contextmanager
def in_bf16(policy: Policy) -> Iterator[None]:
    """The policy's layers without FP8."""
    before = [(config, config.fp8) for config in _configs(policy)]
    for config, _ in before:
        config.fp8 = None
    try:
        yield
    finally:
        for config, fp8 in before:
            config.fp8 = fp8


class Fp8Gate:
    """Compares at the start and every `fp8_check_every` steps; all ranks come to the same verdict.

    `fault` says what is wrong, once something is. With `fp8_action` fallback nothing is ever wrong: the policy goes on
    in bf16, and is not compared any more.
    """

    def __init__(self, policy: Policy, settings: ModelSettings, length_norm: bool) -> None:
        self.policy, self.settings, self.length_norm = policy, settings, length_norm
        self.on, self.started, self.fault = settings.fp8 != "off", False, ""
        self.figures: dict[str, float] = {}

    def before_training(self, step: int, batch: PackedBatch, temperature: float) -> None:
        """The comparison at the start, once, on the first batch there is. Raises RunError: nothing is trained yet."""
        if not self.on or self.started:
            return
        self.started = True
        if self.settings.fp8 == "delayed":
            with torch.enable_grad():  # scales come from forwards with gradient, and there was none
                forward_only(self.policy.stages, [batch], lambda stage, batch: stage(batch, temperature))
        self._compare(step, batch, temperature)
        if self.fault:
            raise RunError(f"{self.fault}. Nothing was trained in this precision")

    def after_step(self, step: int, batch: PackedBatch, temperature: float) -> dict[str, float]:
        """What was measured since the last call: this step's comparison where one is due, else that of the start."""
        every = self.settings.fp8_check_every
        if self.on and every and step % every == 0:
            self._compare(step, batch, temperature)
        figures, self.figures = self.figures, {}
        return figures

    def _compare(self, step: int, batch: PackedBatch, temperature: float) -> None:
        fp8 = self.policy.score([batch], temperature)
        with in_bf16(self.policy):
            bf16 = self.policy.score([batch], temperature)
        sums = torch.zeros(4, dtype=torch.float64, device=self.policy.layout.device)
        for ours, theirs in zip(bf16, fp8, strict=True):  # one on the last pipeline stage, none elsewhere
            sums = differences(ours, theirs, batch.response_cu_seqlens, self.length_norm)
        dist.all_reduce(sums)  # over all ranks: the copies that tensor-parallel ranks have count alike
        self.figures = dict(zip(METRICS, (sums[:3] / sums[3]).tolist(), strict=True))
        self._judge(step, self.figures["fp8/residual_diff"])

    def _judge(self, step: int, found: float) -> None:
        settings = self.settings
        if found <= settings.fp8_budget:  # NaN is not
            return
        unit = "nats a token" if self.length_norm else "nats an answer"
        message = (
            f"step {step}: mean |FP8 - bf16| of the residual is {found:.3g} {unit}, beyond model.fp8_budget = "
            f"{settings.fp8_budget:g} (model.fp8 = {settings.fp8})"
        )
        if settings.fp8_action == "stop":
            self.fault = (
                f"{message}. Take another recipe, model.fp8=off or model.fp8_action=fallback, or raise the budget"
            )
            return
        self.on = False
        for config in _configs(self.policy):
            config.fp8 = None
        if self.policy.layout.rank == 0:
            print(f"flowrl-mega: {message}; going on in bf16", file=sys.stderr)
