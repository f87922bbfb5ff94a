"""The whole lm-head: log-probs and entropy from hidden states [T, H] and a weight [V, H]. The floor is its GEMMs.

Who returns no entropy is said to; another pass for it would be another GEMM.
APIs as of: torch 2.13, Liger 0.8.5, cut-cross-entropy 25.1.1 and 25.6.4, quack 0.6.5, verl 0.9.1.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from typing import Any

import torch
from logprob_logits import Loader, log_softmax, needs
from logprob_oracle import head_errors
from measure import DTYPES, Case, NotRun, Provider, Setting
from torch import Tensor


def setting(options: argparse.Namespace, dtype: str) -> Setting:
    cuda = options.device == "cuda"
    tokens = options.tokens or (8192 if cuda else 2048)
    hidden_size = options.hidden or (4096 if cuda else 576)
    vocab = options.vocab or (131072 if cuda else 49152)
    generator = torch.Generator(options.device).manual_seed(0)
    random = functools.partial(torch.randn, generator=generator, device=options.device)
    to = DTYPES[dtype]
    hidden = random(tokens, hidden_size).to(to)
    weight = (random(vocab, hidden_size) * 3 / hidden_size**0.5).to(to)  # logits of a standard deviation of 3
    target = torch.randint(vocab, (tokens,), generator=generator, device=options.device)
    upstream = torch.rand(tokens, generator=generator, device=options.device) * 2 - 1
    bytes_ = tokens * vocab * hidden.element_size()
    return Setting(
        title=f"lm-head {tokens} x {hidden_size} x {vocab} {dtype} (logits {bytes_ / 1e6:.0f} MB)",
        providers=providers(options.budget_mb << 20),
        case=Case((hidden, weight), target, upstream),
        shape={
            "mode": "head",
            "dtype": dtype,
            "tokens": tokens,
            "hidden": hidden_size,
            "vocab": vocab,
            "logits_bytes": bytes_,
            "budget_bytes": options.budget_mb << 20,
        },  # fmt: skip
        floor=functools.partial(floor, hidden, weight),
        floor_seconds=lambda pass_, seconds: seconds["floor/gemms"],
        floor_work=(2 * tokens * hidden_size * vocab / 1e12, "TFLOP"),
        errors=head_errors,
    )


def floor(hidden: Tensor, weight: Tensor, pass_: str) -> dict[str, Callable[[Case], Any]]:
    """One GEMM without gradient; with it three: the logits, and the gradients of hidden states and weight."""
    logits = hidden.new_zeros(hidden.shape[0], weight.shape[0])
    d_hidden, d_weight = torch.empty_like(hidden), torch.empty_like(weight)

    def gemms(case: Case) -> None:
        hidden, weight = case.leaves
        torch.mm(hidden, weight.t(), out=logits)
        if pass_ != "forward":
            torch.mm(logits, weight, out=d_hidden)
            torch.mm(logits.t(), hidden, out=d_weight)

    return {"floor/gemms": gemms}


def native(device: str, budget: int, backend: Any = "native") -> Provider:
    from flowrl_mega.ops import lm_head_logprob

    def provider(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = lm_head_logprob(hidden, weight, target, logits_budget_bytes=budget, backend=backend)
        return out.logp, out.entropy

    return provider


def eager(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    return log_softmax(hidden @ weight.t(), target)


def torch_linear_cross_entropy(device: str) -> Provider:
    """torch >= 2.13, its chunked path; in chunks that torch chooses."""
    if not hasattr(torch.nn, "LinearCrossEntropyOptions"):
        raise NotRun(f"torch {torch.__version__} has no LinearCrossEntropyOptions")
    options = torch.nn.LinearCrossEntropyOptions()

    def provider(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, None]:
        return -torch.nn.functional.linear_cross_entropy(
            hidden, weight, target, reduction="none", options=options
        ), None

    return provider


def liger(device: str) -> Provider:
    """On Hopper its SM90 kernel; elsewhere its chunked torch code."""
    needs("liger_kernel", device, cuda=False)
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction as Function

    def provider(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        # temperature, ignore_index, m_tiles_per_cluster, return_entropy
        loss, entropy = Function.apply(hidden, weight, target, 1.0, -100, 1, True)
        return -loss, entropy.detach()

    return provider


def cut_cross_entropy(device: str) -> Provider:
    """CCE with every gradient kept ("exact"): version 25.1.1 says so by filter_eps, later ones by a preset too."""
    needs("cut_cross_entropy", device)
    from cut_cross_entropy import LinearCrossEntropyImpl, linear_cross_entropy

    impl = "cce_exact" if "CCE_EXACT" in LinearCrossEntropyImpl.__members__ else "cce"

    def provider(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, None]:
        return -linear_cross_entropy(hidden, weight, target, reduction="none", filter_eps=None, impl=impl), None

    return provider


def quack(device: str) -> Provider:
    """Its chunked function returns a sum or mean alone; per token there is a GEMM and its cross-entropy kernel."""
    needs("quack", device)
    from quack.linear_cross_entropy import linear_cross_entropy_func

    def provider(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, None]:
        loss = linear_cross_entropy_func(hidden, weight, None, target, reduction="none", inplace_backward=True)
        return -loss, None

    return provider


def verl(device: str) -> Provider:
    needs("verl", device)
    from verl.utils.kernel.linear_cross_entropy import linear_cross_entropy

    def provider(hidden: Tensor, weight: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy = linear_cross_entropy(hidden, weight, target, 1.0, "none", None)
        return logp, entropy.detach()

    return provider


def providers(budget: int) -> dict[str, Loader]:
    return {
        "native": functools.partial(native, budget=budget),
        "native.torch": functools.partial(native, budget=budget, backend="torch"),
        "torch.eager": lambda device: eager,
        "torch.linear_cross_entropy": torch_linear_cross_entropy,
        "liger.flsce": liger,
        "cce.exact": cut_cross_entropy,
        "quack": quack,
        "verl": verl,
    }
