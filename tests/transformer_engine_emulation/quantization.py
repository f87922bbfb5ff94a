"""Casts to FP8 and back: Transformer Engine's quantizers, by what they write into which buffer.

A per-tensor cast writes data and, as a Hopper GEMM reads its operands along K only, the transposed data. A block cast
writes 1 x 128 blocks (activations, along the rows and, for the other buffer, along the columns) or 128 x 128 (weights).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from transformer_engine_emulation.enumerations import DType

TORCH_DTYPE = {
    DType.kByte: torch.uint8, DType.kInt32: torch.int32, DType.kFloat32: torch.float32,
    DType.kFloat16: torch.float16, DType.kBFloat16: torch.bfloat16,
}  # fmt: skip
FP8 = {DType.kFloat8E4M3: torch.float8_e4m3fn, DType.kFloat8E5M2: torch.float8_e5m2}
BLOCK = 128


class Cast(NamedTuple):
    """FP8 values as bytes and what to multiply them by, in both of a tensor's representations."""

    rowwise: Tensor
    rowwise_scale_inv: Tensor
    columnwise: Tensor
    columnwise_scale_inv: Tensor


def to_fp8(x: Tensor, scale: Tensor, dtype: int) -> Tensor:
    """Rounded to nearest and saturating; as bytes."""
    most = largest(dtype)
    return (x.float() * scale).clamp(-most, most).to(FP8[DType(dtype)]).view(torch.uint8)


def from_fp8(data: Tensor, dtype: int) -> Tensor:
    return data.view(FP8[DType(dtype)]).float()


def largest(dtype: int) -> float:
    return torch.finfo(FP8[DType(dtype)]).max


def scale_for(amax: Tensor, most: float, epsilon: float, power_of_2: bool) -> Tensor:
    """That brings `amax` to the largest value of the type; 1 where there is nothing to bring there."""
    amax = amax.clamp(min=epsilon)
    usable = (amax > 0) & torch.isfinite(amax)
    scale = torch.where(usable, most / amax, 1.0).clamp(max=torch.finfo(torch.float32).max)
    return torch.exp2(scale.log2().floor()) if power_of_2 else scale


def transposed(data: Tensor) -> Tensor:
    """[..., K] -> [K, ...]"""
    return data.reshape(-1, data.shape[-1]).t().contiguous().view(data.shape[-1], *data.shape[:-1])


def delayed_cast(x: Tensor, quantizer: Any) -> Cast:
    """With the scale that earlier steps chose; its amax is noted for later ones."""
    if x.numel():
        quantizer.amax.copy_(torch.maximum(quantizer.amax, x.abs().max().float()))
    return tensor_cast(x, quantizer.scale, quantizer.dtype)


def current_cast(x: Tensor, quantizer: Any) -> Cast:
    """With a scale from its own amax, the largest over the ranks that hold parts of the tensor."""
    amax = x.abs().max().float().view(1) if x.numel() else torch.zeros(1)
    if quantizer.with_amax_reduction:
        group = quantizer.amax_reduction_group
        torch.distributed.all_reduce(amax, op=torch.distributed.ReduceOp.MAX, group=group)
    most = largest(quantizer.dtype)
    scale = scale_for(amax, most, quantizer.amax_epsilon, quantizer.force_pow_2_scales)
    return tensor_cast(x, scale, quantizer.dtype)


def tensor_cast(x: Tensor, scale: Tensor, dtype: int) -> Cast:
    data, scale_inv = to_fp8(x, scale, dtype), scale.float().reciprocal()
    return Cast(data, scale_inv, transposed(data), scale_inv)


def block_cast(x: Tensor, quantizer: Any) -> Cast:
    flat = x.reshape(-1, x.shape[-1])
    if quantizer.block_scaling_dim == 2:
        data, scale_inv = in_blocks(flat, BLOCK, quantizer)
        data = data.view(x.shape)
        return Cast(data, pad(scale_inv), transposed(data), pad(scale_inv.t()))
    rows, row_scales = in_blocks(flat, 1, quantizer)
    columns, column_scales = in_blocks(flat.t(), 1, quantizer)
    columns = columns.view(x.shape[-1], *x.shape[:-1])
    return Cast(rows.view(x.shape), pad(row_scales.t()), columns, pad(column_scales.t()))


def in_blocks(x: Tensor, height: int, quantizer: Any) -> tuple[Tensor, Tensor]:
    """x [M, K] in blocks of `height` x 128: its bytes, and [ceil(M / height), ceil(K / 128)] to multiply them by."""
    m, k = x.shape
    blocks = cut(x.float(), height)
    most, power_of_2 = largest(quantizer.dtype), quantizer.force_pow_2_scales
    scale = scale_for(blocks.abs().amax((1, 3)), most, quantizer.amax_epsilon, power_of_2)
    data = to_fp8(blocks, scale[:, None, :, None], quantizer.dtype)
    rows = blocks.shape[0] * height
    return data.view(rows, -1)[:m, :k].contiguous(), scale.reciprocal()


def cut(x: Tensor, height: int) -> Tensor:
    """[M, K] filled up with zeros -> [blocks of M, height, blocks of K, 128]"""
    m, k = x.shape
    padded = torch.nn.functional.pad(x, (0, -k % BLOCK, 0, -m % height))
    return padded.view(-(-m // height), height, -(-k // BLOCK), BLOCK)


def pad(scales: Tensor) -> Tensor:
    """As the GEMM wants them: rows of 16 bytes."""
    return torch.nn.functional.pad(scales, (0, -scales.shape[1] % 4)).contiguous()


CASTS = {
    "Float8Quantizer": delayed_cast,
    "Float8CurrentScalingQuantizer": current_cast,
    "Float8BlockQuantizer": block_cast,
}


def cast(x: Tensor, quantizer: Any) -> Cast:
    name = type(quantizer).__name__
    if name not in CASTS:
        raise NotImplementedError(f"quantize with a {name}: not emulated")
    return CASTS[name](x.detach(), quantizer)


def quantize(tensor: Tensor, quantizer: Any, output: Any = None, noop: Tensor | None = None) -> Any:
    found = cast(tensor, quantizer)
    if output is None:
        return wrapped(found, quantizer, tensor.shape, tensor.dtype)
    if noop is not None and noop.item():
        return output
    if is_block_scaled(output):
        write(output._rowwise_data, output._rowwise_scale_inv, found.rowwise, found.rowwise_scale_inv)
        write(output._columnwise_data, output._columnwise_scale_inv, found.columnwise, found.columnwise_scale_inv)
        return output
    write(output._data, output._scale_inv, found.rowwise, found.rowwise_scale_inv)
    if quantizer.columnwise_usage and output._transpose is None:
        output._transpose = torch.empty_like(found.columnwise)
    if output._transpose is not None and quantizer.columnwise_usage:
        write(output._transpose, output._scale_inv, found.columnwise, found.columnwise_scale_inv)
        output._transpose_invalid = False
    return output


def write(data: Tensor | None, scale_inv: Tensor, new: Tensor, new_scale_inv: Tensor) -> None:
    if data is not None:
        data.copy_(new.view(data.shape))
        scale_inv.copy_(new_scale_inv)


def wrapped(found: Cast, quantizer: Any, shape: torch.Size, dtype: torch.dtype) -> Any:
    """The quantised tensor, or its storage alone, in the representations that the quantizer is to make."""
    from transformer_engine.pytorch.tensor import float8_blockwise_tensor, float8_tensor

    fields: dict[str, Any] = dict(fp8_dtype=quantizer.dtype, quantizer=quantizer)
    if type(quantizer).__name__ == "Float8BlockQuantizer":
        bare, full = (
            float8_blockwise_tensor.Float8BlockwiseQTensorStorage,
            float8_blockwise_tensor.Float8BlockwiseQTensor,
        )
        fields |= dict.fromkeys(("rowwise_data", "rowwise_scale_inv", "columnwise_data", "columnwise_scale_inv"))
        if quantizer.rowwise_usage:
            fields |= dict(rowwise_data=found.rowwise, rowwise_scale_inv=found.rowwise_scale_inv)
        if quantizer.columnwise_usage:
            fields |= dict(columnwise_data=found.columnwise, columnwise_scale_inv=found.columnwise_scale_inv)
        fields["is_2D_scaled"] = quantizer.block_scaling_dim == 2
    else:
        bare, full = float8_tensor.Float8TensorStorage, float8_tensor.Float8Tensor
        fields |= dict(data=found.rowwise if quantizer.rowwise_usage else None, fp8_scale_inv=found.rowwise_scale_inv)
        fields["data_transpose"] = found.columnwise if quantizer.columnwise_usage else None
    if quantizer.internal:
        return bare(fake_dtype=dtype, **fields)
    return full(shape=shape, dtype=dtype, device=torch.device("cpu"), **fields)


def create_empty_quantized_tensor(quantizer: Any, shape: Any, dtype: torch.dtype, device: Any, pin_memory: bool) -> Any:
    quiet = quantizer.copy()  # neither an amax noted nor one shared with other ranks
    quiet.with_amax_reduction = False
    if hasattr(quiet, "amax"):
        quiet.amax = torch.zeros(1)
    return wrapped(cast(torch.zeros(tuple(shape)), quiet), quantizer, torch.Size(shape), dtype)


def is_fp8(x: Any) -> bool:
    return hasattr(x, "_fp8_dtype")


def is_block_scaled(x: Any) -> bool:
    return hasattr(x, "_is_2D_scaled")


def dequantized(x: Any, rowwise: bool) -> Tensor:
    """[M, K] in fp32, read from one of its representations only."""
    which = "rowwise" if rowwise else "columnwise"
    if is_block_scaled(x):
        data, scale_inv = getattr(x, f"_{which}_data"), getattr(x, f"_{which}_scale_inv")
        assert data is not None, f"there is no {which} data"
        data = data.reshape(-1, data.shape[-1]) if rowwise else data.reshape(data.shape[0], -1)
        values = from_fp8(data, x._fp8_dtype) * spread(scale_inv, data.shape, x._is_2D_scaled)
        return values if rowwise else values.t()
    if rowwise:
        assert x._data is not None, "there is no rowwise data"
        return from_fp8(x._data, x._fp8_dtype).reshape(-1, x._data.shape[-1]) * x._scale_inv
    assert x._transpose is not None and not x._transpose_invalid, "there is no valid transpose"
    return (from_fp8(x._transpose, x._fp8_dtype).reshape(x._transpose.shape[0], -1) * x._scale_inv).t()


def spread(scale_inv: Tensor, shape: torch.Size, square: bool) -> Tensor:
    """Each element's scale."""
    m, k = shape
    if square:
        blocks = scale_inv[:, : -(-k // BLOCK)].repeat_interleave(BLOCK, 0)[:m]
    else:
        blocks = scale_inv[:, :m].t()
    return blocks.repeat_interleave(BLOCK, 1)[:, :k]


def dequantize(input: Any, otype: int) -> Tensor:
    data = input._rowwise_data if is_block_scaled(input) else input._data
    return dequantized(input, rowwise=data is not None).reshape(input.size()).to(TORCH_DTYPE[DType(otype)])


def fp8_transpose(input: Tensor, dtype: int, *, out: Tensor | None = None) -> Tensor:
    return transposed(input) if out is None else out.copy_(transposed(input).view(out.shape))


def bgrad_quantize(input: Tensor, quantizer: Any) -> tuple[Tensor, Any]:
    return input.reshape(-1, input.shape[-1]).float().sum(0).to(input.dtype), quantize(input, quantizer)


def compute_amax(input: Tensor, amax: Tensor) -> None:
    amax.copy_(input.abs().max().float().view_as(amax))


def fused_amax_and_scale_update_after_reduction(
    amax_reduction_buffer: Tensor,
    amax_histories: list[Tensor],
    scales: list[Tensor],
    amax_compute_algo: str,
    fp8_dtype: int,
    margin: float,
) -> None:
    """The amaxes of a step, in one buffer, enter the histories; scales follow from these."""
    steps = amax_reduction_buffer.split([history.shape[1] for history in amax_histories])
    for amax, history, scale in zip(steps, amax_histories, scales, strict=True):
        history[0] = amax
        found = history.amax(0) if amax_compute_algo == "max" else amax
        history.copy_(history.roll(-1, 0))
        history[0].zero_()
        new = scale_for(found, largest(fp8_dtype) / 2**margin, 0.0, False)
        scale.copy_(torch.where((found > 0) & torch.isfinite(found), new, scale))


def multi_tensor_compute_scale_and_scale_inv(
    chunk_size: int, noop: Tensor, tensor_lists: list[list[Tensor]], max_fp8: float, power_of_2: bool, epsilon: float
) -> None:
    for amax, scale, scale_inv in zip(*tensor_lists, strict=True):
        scale.copy_(scale_for(amax, max_fp8, epsilon, power_of_2))
        scale_inv.copy_(scale.reciprocal())


def fp8_block_scaling_compute_partial_amax(
    tensor: Tensor, amax: Tensor, h: int, w: int, start_offset: int, block_len: int
) -> None:
    """Of a share of a weight [h, w], which is in 128 x 128 blocks: the elements from `start_offset` on."""
    whole = torch.zeros(h * w)
    whole[start_offset : start_offset + tensor.numel()] = tensor.reshape(-1).float()
    found = cut(whole.view(h, w), BLOCK).abs().amax((1, 3))
    amax[: found.shape[0], : found.shape[1]] = found


def fp8_block_scaling_partial_cast(
    inp: Tensor, out: Tensor, scale: Tensor, h: int, w: int, start_offset: int, block_len: int, out_dtype: int
) -> None:
    blocks = scale[: -(-h // BLOCK), : -(-w // BLOCK)]
    each = blocks.repeat_interleave(BLOCK, 0)[:h].repeat_interleave(BLOCK, 1)[:, :w].reshape(-1)
    share = slice(start_offset, start_offset + inp.numel())
    out.copy_(to_fp8(inp.reshape(-1), each[share], out_dtype).view(out.shape))
