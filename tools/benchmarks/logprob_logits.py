"""Log-probs and entropy from logits [T, V], by whoever offers them, and the floor: reading and writing the logits.

A provider that has no entropy of its own gets one from a torch.compile'd pass that reads the logits once.
APIs as of: megatron-core 0.19.2, Liger 0.8.5, quack 0.6.5, verl 0.9.1, Transformer Engine 2.x.
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import types
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from logprob_oracle import logits_errors
from measure import DTYPES, Case, NotRun, Provider, Setting
from torch import Tensor

Loader = Callable[[str], Provider]  # of the device ("cpu" or "cuda"): imports what the provider needs; raises NotRun


def setting(options: argparse.Namespace, dtype: str) -> Setting:
    tokens, vocab = options.tokens or 2048, options.vocab or 32000
    generator = torch.Generator(options.device).manual_seed(0)
    logits = torch.randn(tokens, vocab, generator=generator, device=options.device) * 3
    target = torch.multinomial(logits.softmax(-1), 1, generator=generator)[:, 0]
    upstream = torch.rand(tokens, generator=generator, device=options.device) * 2 - 1
    logits = logits.to(DTYPES[dtype])
    bytes_ = logits.numel() * logits.element_size()
    return Setting(
        title=f"logits {tokens} x {vocab} {dtype} ({bytes_ / 1e6:.0f} MB)",
        providers=providers(options.device),
        case=Case((logits,), target, upstream),
        shape={"dtype": dtype, "tokens": tokens, "vocab": vocab, "logits_bytes": bytes_},
        floor=functools.partial(floor, logits),
        floor_seconds=floor_seconds,
        floor_work=(bytes_ / 1e9, "GB"),
        errors=logits_errors,
    )


def floor(logits: Tensor, pass_: str) -> dict[str, Callable[[Case], Any]]:
    """Ways to read the logits, and to read and write them; the bytes are taken as fp32, whatever they are."""

    def words(case: Case) -> Tensor:
        flat = case.leaves[0].flatten()
        return flat[: flat.numel() // 2 * 2].view(torch.float32)

    buffer = torch.empty_like(words(Case((logits,), logits, logits)))
    return {
        "floor/sum": lambda case: words(case).sum(),
        "floor/amax": lambda case: words(case).amax(),
        "floor/copy": lambda case: buffer.copy_(words(case)),
        "floor/update": lambda case: words(case).mul_(1.0),
    }


def floor_seconds(pass_: str, seconds: dict[str, float]) -> float:
    """Forward: one read. Forward and backward: two reads and one write."""
    read = min(seconds["floor/sum"], seconds["floor/amax"], seconds["floor/copy"] / 2)
    return read if pass_ == "forward" else read + min(seconds["floor/copy"], seconds["floor/update"])


def log_softmax(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """As everyone writes it."""
    logp = torch.log_softmax(logits.float(), -1)
    fixed = logp.detach()
    return _pick(logp, target), -(fixed.exp() * fixed).sum(-1)


def statistics(
    logits: Tensor, target: Tensor, pick: Callable[[Tensor, Tensor], Tensor] | None = None
) -> tuple[Tensor, Tensor]:
    """From the row's maximum and two sums, as csrc does it: a compiler need not store anything of size T x V."""
    logits = logits.float()
    d = logits - logits.detach().amax(-1, keepdim=True)
    e = d.exp()
    log_sum = e.sum(-1).log()
    fixed, weight = d.detach(), e.detach()
    return (pick or _pick)(d, target) - log_sum, log_sum.detach() - (fixed * weight).sum(-1) / weight.sum(-1)


def masked(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The same for a compiler: gather's backward makes it write a matrix of zeros first, a mask's is fused."""
    return statistics(logits, target, _pick_masked)


EAGER = (log_softmax, statistics)
COMPILED = (*EAGER, masked)


def _pick(rows: Tensor, target: Tensor) -> Tensor:
    return rows.gather(1, target[:, None])[:, 0]


def _pick_masked(rows: Tensor, target: Tensor) -> Tensor:
    columns = torch.arange(rows.shape[1], device=rows.device)
    return torch.where(columns == target[:, None], rows, 0.0).sum(-1)


def compiled(function: Callable[..., Any], mode: str = "default") -> Callable[..., Any]:
    return torch.compile(function, dynamic=False, fullgraph=True, mode=mode)


@functools.cache
def _entropy_pass() -> Callable[..., Any]:
    return compiled(lambda logits, target: statistics(logits.detach(), target)[1])


def with_entropy(logp: Callable[[Tensor, Tensor], Tensor]) -> Provider:
    """The entropy comes first: some providers overwrite the logits as they read them."""

    def provider(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        entropy = _entropy_pass()(logits, target)
        return logp(logits, target), entropy

    return provider


def needs(package: str, device: str, cuda: bool = True) -> None:
    if cuda and device != "cuda":
        raise NotRun("needs CUDA")
    if importlib.util.find_spec(package) is None:
        raise NotRun(f"{package} is not installed")


def native(device: str, backend: Any = "native") -> Provider:
    from flowrl_mega.ops import logprob

    def provider(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        out = logprob(logits, target, inplace_backward=True, backend=backend)
        return out.logp, out.entropy

    return provider


class _InPlace(torch.autograd.Function):
    """The most that torch.compile can be made to do by hand: its backward overwrites the logits, as ours does."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        logp, entropy, shift = _in_place_parts()[0](logits, target)
        ctx.logits = logits
        ctx.save_for_backward(target, shift)
        ctx.mark_non_differentiable(entropy)
        return logp, entropy

    @staticmethod
    def backward(ctx: Any, grad: Tensor, _: Any) -> tuple[Tensor, None]:
        _in_place_parts()[1](ctx.logits.detach(), *ctx.saved_tensors, grad)
        return ctx.logits.detach(), None


@functools.cache
def _in_place_parts() -> tuple[Callable[..., Any], Callable[..., Any]]:
    def forward(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logits = logits.float()
        maximum = logits.amax(-1)
        d = logits - maximum[:, None]
        e = d.exp()
        total = e.sum(-1)
        log_sum = total.log()
        return _pick(d, target) - log_sum, log_sum - (d * e).sum(-1) / total, maximum + log_sum

    def backward(logits: Tensor, target: Tensor, shift: Tensor, grad: Tensor) -> None:
        p = (logits.float() - shift[:, None]).exp()
        mine = torch.arange(logits.shape[1], device=logits.device) == target[:, None]
        logits.copy_(grad[:, None] * (mine.float() - p))

    return compiled(forward), compiled(backward)


def _compile_modes(device: str) -> list[str]:
    # max-autotune tunes GEMM templates and Triton launches: on CPU these functions compile to the same code without it.
    return ["default", "max-autotune-no-cudagraphs"] if device == "cuda" else ["default"]


def _megatron(device: str) -> dist.ProcessGroup:
    """Makes megatron-core importable and a group of one rank for it to reduce over."""
    needs("megatron", device, cuda=False)
    name = "megatron.core.transformer.moe.ops.paged_stash"
    if importlib.util.find_spec("triton") is None and name not in sys.modules:
        # Always imported, and needs Triton. (cuda_is_cpu has this stub too, but it turns Megatron's torch.compile off.)
        stub: Any = types.ModuleType(name)
        stub.GLOBAL_BLOCK_SIZE, stub.paged_stash_copy_kernel, stub.paged_stash_pop_kernel = 1024, None, None
        sys.modules[name] = stub
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core\.")
    if not dist.is_initialized():
        backend = "nccl" if device == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    group = dist.group.WORLD
    assert group is not None
    return group


def megatron_unfused(device: str) -> Provider:
    group = _megatron(device)
    from megatron.core.tensor_parallel import vocab_parallel_cross_entropy

    return with_entropy(lambda logits, target: -vocab_parallel_cross_entropy(logits, target, tp_group=group))


def megatron_fused(device: str) -> Provider:
    group = _megatron(device)
    from megatron.core.fusions.fused_cross_entropy import fused_vocab_parallel_cross_entropy

    return with_entropy(lambda logits, target: -fused_vocab_parallel_cross_entropy(logits, target, group))


def transformer_engine(device: str) -> Provider:
    needs("transformer_engine", device)
    from transformer_engine.pytorch.cross_entropy import parallel_cross_entropy

    # [B, S, V]; label smoothing, reduce_loss, group. Its backward overwrites the logits.
    return with_entropy(
        lambda logits, target: -parallel_cross_entropy(logits[None], target[None], 0.0, False, None).view(-1)
    )


def liger_vocab_parallel(device: str) -> Provider:
    needs("liger_kernel", device)
    from liger_kernel.transformers.vocab_parallel_cross_entropy import LigerVocabParallelCrossEntropy

    loss = LigerVocabParallelCrossEntropy()
    return with_entropy(lambda logits, target: -loss(logits[:, None], target[:, None])[:, 0])


def quack(device: str) -> Provider:
    needs("quack", device)
    from quack.cross_entropy import cross_entropy

    return with_entropy(lambda logits, target: -cross_entropy(logits, target, reduction="none", inplace_backward=True))


def verl_torch(device: str) -> Provider:
    """verl's path for logits: flash-attn's cross-entropy where installed, else a loop over rows. Its own entropy."""
    needs("verl", device, cuda=False)
    from verl.utils.torch_functional import entropy_from_logits, logprobs_from_logits

    def provider(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        entropy = entropy_from_logits(logits.detach())
        return logprobs_from_logits(logits, target), entropy

    return provider


def providers(device: str) -> dict[str, Loader]:
    """Names before a "/" are one provider in several formulations, of which the fastest one that is right counts."""
    table: dict[str, Loader] = {"native": native, "native.torch": functools.partial(native, backend="torch")}
    for function in EAGER:
        table[f"torch.eager/{function.__name__}"] = lambda device, f=function: f
    for function in COMPILED:
        for mode in _compile_modes(device):
            table[f"torch.compile/{function.__name__} {mode}"] = lambda device, f=function, mode=mode: compiled(f, mode)
    return table | {
        "torch.compile.inplace": lambda device: _InPlace.apply,
        "megatron.unfused": megatron_unfused,
        "megatron.fused": megatron_fused,
        "transformer_engine": transformer_engine,
        "liger.vocab_parallel": liger_vocab_parallel,
        "quack": quack,
        "verl.torch": verl_torch,
    }
