"""What a caller can get wrong, said before any kernel runs.

On CUDA the values of a tensor are unknown to the host, and asking would stop it until all earlier work is done. There a
wrong value raises a flag on the device; `raise_if_flagged` reads it where the trainer waits for the device anyway.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from flowrl_mega.ops.torch_ops import stats_dtype

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)

_FLAGS: dict[torch.device, Tensor] = {}  # one bool a CUDA device, true after a target or an offset out of range


def logits(x: Tensor) -> None:
    if x.dim() not in (2, 3):
        raise ValueError(f"logits have shape {list(x.shape)}; [T, V] or [B, S, V] is wanted")
    if x.dtype not in DTYPES or (x.dtype == torch.float64 and x.is_cuda):
        raise ValueError(f"logits are {x.dtype}; float32, bfloat16 or float16 is wanted (float64 on CPU only)")
    if x.shape[-1] > 1 and x.stride(-1) != 1:
        raise ValueError(f"logits have stride {x.stride(-1)} between columns, 1 is wanted; call .contiguous()")
    steps = [(x.stride(i), x.shape[i]) for i in range(x.dim() - 1) if x.shape[i] > 1]
    if len(steps) == 2 and steps[1][0] > steps[0][0]:
        steps.reverse()
    extent = x.shape[-1]  # of what lies inside one step
    for stride, size in reversed(steps):
        if stride < extent:
            raise ValueError(f"logits have rows of {x.shape[-1]} that overlap (stride {stride}); call .contiguous()")
        extent += (size - 1) * stride


def head(hidden: Tensor, weight: Tensor, rows: Tensor | None, valid: int) -> None:
    if hidden.dim() not in (2, 3) or weight.dim() != 2 or hidden.shape[-1] != weight.shape[1]:
        shapes = f"hidden {list(hidden.shape)}, weight {list(weight.shape)}"
        raise ValueError(f"{shapes}: [T, H] (or [B, S, H]) and [V, H] with one H are wanted")
    if hidden.dtype not in DTYPES or weight.dtype not in DTYPES:
        raise ValueError(f"hidden is {hidden.dtype}, weight {weight.dtype}: floating types are wanted")
    vocab_valid(valid, weight.shape[0])
    if rows is None:
        return
    if rows.dim() != 1 or rows.dtype != torch.int64:
        raise ValueError(f"rows is {rows.dtype} of shape {list(rows.shape)}; int64 of [R] is wanted")
    if hidden.dim() != 2:
        raise ValueError(f"hidden {list(hidden.shape)}: rows select from [T, H]; call .flatten(0, 1)")


def head_options(weight: Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> None:
    if bias is not None and (
        bias.shape != weight.shape[:1] or bias.dtype not in DTYPES or bias.device != weight.device
    ):
        raise ValueError(
            f"bias is {bias.dtype} of shape {list(bias.shape)} on {bias.device}; a floating type, [{weight.shape[0]}] "
            f"and {weight.device} are wanted, as of the weight"
        )
    for name, value in (("logit_scale", logit_scale), ("softcap", softcap)):
        if value is not None and not 0 < value < math.inf:
            raise ValueError(f"{name} = {value}: must be above 0 and finite")


def liger_options(temperature: float | Tensor, bias: Tensor | None, logit_scale: float, softcap: float | None) -> float:
    """The temperature, which must be one for all rows."""
    if isinstance(temperature, Tensor) or bias is not None or logit_scale != 1 or softcap is not None:
        raise ValueError(
            "ops.backend = liger: takes one temperature for all rows, no bias, logit_scale or softcap; "
            "use ops.backend=auto"
        )
    return temperature


def vocab_valid(valid: int, columns: int) -> int:
    if not 0 <= valid <= columns:
        raise ValueError(f"vocab_valid = {valid}: must lie in 0..{columns}, the columns that there are")
    return valid


def target(
    x: Tensor, shape: Sequence[int], vocab: int | None, device: torch.device, ignore_index: int | None = None
) -> Tensor:
    """Ids below `vocab` (None: not known here), or ignore_index, in a tensor of that shape: [T] int64, contiguous."""
    if x.shape != torch.Size(shape) or x.dtype not in (torch.int32, torch.int64):
        wanted = f"int64 or int32 of shape {list(shape)}"
        raise ValueError(f"target is {x.dtype} of shape {list(x.shape)}; {wanted} is wanted")
    if x.device != device:
        raise ValueError(f"target is on {x.device}, the rows on {device}; move one of them")
    if vocab is not None and x.numel():
        wrong = (x < 0) | (x >= vocab)
        if ignore_index is not None:
            wrong &= x != ignore_index
        if _flagged(wrong):
            first = wrong.nonzero()[0].tolist()
            ignored = "" if ignore_index is None else f" or {ignore_index} (ignored)"
            place = ", ".join(map(str, first))
            raise ValueError(f"target[{place}] = {int(x[tuple(first)])}: an id in 0..{vocab - 1}{ignored} is wanted")
    return x.reshape(-1).to(torch.int64).contiguous()


def cu_seqlens(x: Tensor | None, shape: Sequence[int], device: torch.device) -> Tensor:
    """Offsets [B + 1] from 0 to the number of rows, never falling, as int64; None: [T] rows are one sequence, those of
    [B, S] one for each of B."""
    rows = math.prod(shape)
    if x is None:
        return torch.arange(2 if len(shape) == 1 else shape[0] + 1, device=device) * shape[-1]
    if x.dim() != 1 or x.numel() == 0 or x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"cu_seqlens is {x.dtype} of shape {list(x.shape)}; int32 or int64 of [B + 1] is wanted")
    if x.device != device:
        raise ValueError(f"cu_seqlens is on {x.device}, the rows on {device}; move one of them")
    wrong = (x[:1] != 0).any() | (x[-1:] != rows).any() | (x.diff() < 0).any()
    if _flagged(wrong):
        raise ValueError(f"cu_seqlens = {x.tolist()}: must rise from 0 to {rows}, the number of rows")
    return x.to(torch.int64).contiguous()


def inv_temperature(temperature: float | Tensor, shape: Sequence[int], like: Tensor, factor: float = 1.0) -> Tensor:
    """factor / temperature, [1] or [T] for rows of that shape, in the type of the statistics."""
    dtype = stats_dtype(like.dtype)
    if isinstance(temperature, Tensor):
        if temperature.shape != torch.Size(shape):
            raise ValueError(f"temperature has shape {list(temperature.shape)}; a number or {list(shape)} is wanted")
        temperature = temperature.reshape(-1)
        if _flagged(wrong := ~(temperature > 0)):
            first = int(wrong.nonzero()[0])
            raise ValueError(f"temperature[{first}] = {float(temperature[first])}: must be above 0")
        return (factor / temperature.to(like.device, torch.float64)).to(dtype)
    if not temperature > 0:
        raise ValueError(f"temperature = {temperature}: must be above 0")
    return torch.full((1,), factor / temperature, dtype=dtype, device=like.device)


def raise_if_flagged() -> None:
    """ValueError if a value was out of range in a call on a CUDA device since the last time; waits for the device."""
    for device, flag in _FLAGS.items():
        if bool(flag):
            flag.zero_()
            raise ValueError(
                f"a target, a temperature or an offset of cu_seqlens was out of range in an earlier call on {device}"
            )


def _flagged(wrong: Tensor) -> bool:
    """On CPU whether any is wrong; on CUDA that is left in the device's flag."""
    if torch.compiler.is_compiling():
        return False  # the op itself checks
    if not wrong.is_cuda:
        return bool(wrong.any())
    _flag(wrong.device).logical_or_(wrong.any())
    return False


def _flag(device: torch.device) -> Tensor:
    """The device's own. A tensor of inference mode could not be written to outside of it."""
    if device not in _FLAGS:
        with torch.inference_mode(False):
            _FLAGS[device] = torch.zeros((), dtype=torch.bool, device=device)
    return _FLAGS[device]
