"""The ops of csrc under torch.library: their schemas and shapes, the choice between native kernels and plain torch.

Schemas and fake kernels live here; the libraries built from csrc only add kernels for CPU and CUDA tensors. What each
op computes is written down in `torch_ops`, which has the same functions in plain torch.
"""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable
from typing import Any, Literal, NamedTuple
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor

from flowrl_mega.ops import build, liger, torch_ops

logger = logging.getLogger(__name__)

Name = Literal["auto", "native", "torch"]

_ROWS = "Tensor target, Tensor inv_temperature, int vocab_start, int vocab_valid, int ignore_index"
_GRAD = (
    "Tensor target, Tensor grad, Tensor maximum, Tensor log_sum, Tensor inv_temperature, "
    "int vocab_start, int vocab_valid, int ignore_index"
)
_SLOPED = "Tensor? offset=None, Tensor? slope=None"
SCHEMAS = {
    "logprob_stats": f"(Tensor logits, {_ROWS}, bool entropy) -> Tensor",
    "segment_reduce": "(Tensor stats, Tensor target, Tensor inv_temperature, Tensor cu_seqlens, int ignore_index) "
    "-> (Tensor logp, Tensor entropy, Tensor maximum, Tensor log_sum, Tensor sequence)",
    "logprob_backward_": f"(Tensor(a!) logits, {_GRAD}, {_SLOPED}) -> ()",
    "logprob_backward": f"(Tensor logits, {_GRAD}, ScalarType dtype, {_SLOPED}) -> Tensor",
    "cpu_instruction_set": "(int limit=-1) -> int",
}
for _name, _schema in SCHEMAS.items():
    torch.library.define(f"flowrl::{_name}", _schema)


class Kernels(NamedTuple):
    """One implementation of the ops; signatures as in SCHEMAS."""

    logprob_stats: Callable[..., Tensor]
    segment_reduce: Callable[..., tuple[Tensor, Tensor, Tensor, Tensor, Tensor]]
    logprob_backward_: Callable[..., None]
    logprob_backward: Callable[..., Tensor]


_OPS = torch.ops.flowrl
NATIVE = Kernels(_OPS.logprob_stats, _OPS.segment_reduce, _OPS.logprob_backward_, _OPS.logprob_backward)
TORCH = Kernels(
    torch_ops.logprob_stats, torch_ops.segment_reduce, torch_ops.logprob_backward_, torch_ops.logprob_backward
)


def kernels_for(name: Name, device: torch.device) -> Kernels:
    """The kernels for tensors on `device`. "auto": native ones, or plain torch with one warning where there are none.

    Raises build.BuildError for "native" where the library cannot be built.
    """
    kind = _kind(device)
    if name == "torch":
        return TORCH
    if name == "native":
        load(kind)
    elif fault := _fault(kind):
        _warn(fault)
        return TORCH
    return NATIVE


def describe(name: Name | Literal["liger"], device: torch.device) -> str:
    """In words, which kernels tensors on `device` get; builds them if need be. BuildError as in `kernels_for`."""
    if name == "liger":
        liger.check()
        return "Liger-Kernel's fused linear cross entropy"
    if name == "native":
        load(_kind(device))
    fault = _fault(_kind(device)) if name == "auto" else None
    if name == "torch" or fault:
        return "plain torch" + (f", since {fault}" if fault else "")
    if device.type == "cuda":
        return "native CUDA kernels"
    return f"native CPU kernels, {('plain C++', 'AVX2', 'AVX-512')[_OPS.cpu_instruction_set()]}"


_AGREED: WeakKeyDictionary[dist.ProcessGroup, set[str]] = WeakKeyDictionary()  # backends, by group


class UnlikeRanks(ValueError):
    """Ranks that share a vocabulary would run unlike kernels."""


def check_ranks(name: Name | Literal["liger"], device: torch.device, group: dist.ProcessGroup) -> None:
    """UnlikeRanks, on all ranks of `group`, where they would run unlike kernels: they combine the same numbers, and
    must come to the same bits. The first call for a group gathers one text a rank, so all of them must make it."""
    agreed = _AGREED.setdefault(group, set())
    if group.size() == 1 or name in agreed:
        return
    try:
        mine = describe(name, device)
    except build.BuildError as error:
        mine = f"none, since {error}"
    found: list[str] = [""] * group.size()
    dist.all_gather_object(found, mine, group=group)
    kinds = [text.split(",")[0] for text in found]  # the CPU's instruction set is each rank's own affair
    if len(set(kinds)) > 1:
        first = {kind: text for kind, text in reversed(list(zip(kinds, found, strict=True)))}
        ranks = {kind: [dist.get_global_rank(group, i) for i, own in enumerate(kinds) if own == kind] for kind in first}
        told = "; ".join(f"rank {', '.join(map(str, ranks[kind]))}: {first[kind]}" for kind in sorted(first))
        raise UnlikeRanks(f"ops.backend = {name}: ranks that share a vocabulary must run the same kernels ({told})")
    agreed.add(name)


@functools.cache
def load(kind: build.Kind) -> None:
    """Build the library if that has not been done, and register its kernels; BuildError if it cannot be."""
    path = build.library(kind)
    try:
        torch.ops.load_library(str(path))
    except OSError as error:
        raise build.BuildError(f"{path} cannot be loaded ({error}); remove it to have it built again") from None


def _kind(device: torch.device) -> build.Kind:
    return "cuda" if device.type == "cuda" else "cpu"


@functools.cache
def _fault(kind: build.Kind) -> str | None:
    """Why there is no native library, or None."""
    try:
        load(kind)
    except build.BuildError as error:
        return str(error)
    return None


@functools.cache
def _warn(fault: str) -> None:
    """Once, and by one rank of a job."""
    if not (dist.is_initialized() and dist.get_rank()):
        logger.warning("ops.backend = auto: plain torch, slower and with more memory, since %s", fault)


@torch.library.register_fake("flowrl::logprob_stats")
def _(logits: Tensor, target: Tensor, *_: Any) -> Tensor:
    return logits.new_empty(4, logits.shape[0], dtype=torch_ops.stats_dtype(logits.dtype))


@torch.library.register_fake("flowrl::segment_reduce")
def _(stats: Tensor, target: Tensor, inv_temperature: Tensor, cu_seqlens: Tensor, ignore_index: int) -> Any:
    rows = [stats.new_empty(stats.shape[2]) for _ in range(4)]
    return (*rows, stats.new_empty(cu_seqlens.shape[0] - 1, 3, dtype=torch.float64))


@torch.library.register_fake("flowrl::logprob_backward_")
def _(logits: Tensor, *_: Any, **__: Any) -> None:
    return None


@torch.library.register_fake("flowrl::logprob_backward")
def _(logits: Tensor, *rows: Any, dtype: torch.dtype | None = None, **_: Any) -> Tensor:
    return logits.new_empty(logits.shape, dtype=dtype or rows[8])
