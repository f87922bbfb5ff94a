"""generic_gemm: what cuBLASLt multiplies on Hopper, and what it refuses."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from transformer_engine_emulation.enumerations import DType
from transformer_engine_emulation.quantization import TORCH_DTYPE, dequantized, is_block_scaled, is_fp8, quantize


def operand(x: Any, rowwise: bool) -> Tensor:
    """As fp32 [M, K]. FP8 on Hopper: from the representation in which the GEMM's inner dimension is contiguous."""
    return dequantized(x, rowwise) if is_fp8(x) else x.detach().reshape(-1, x.shape[-1]).float()


def generic_gemm(
    A: Any,
    transA: bool,
    B: Any,
    transB: bool,
    D: Tensor | None,
    quantizer: Any,
    output_dtype: int | None,
    bias: Tensor | None,
    bias_type: int,
    gelu: bool,
    gelu_in: Tensor | None,
    grad: bool,
    workspace: Tensor,
    workspace_size: int,
    accumulate: bool,
    use_split_accumulator: bool,
    comm_overlap: Any = None,
    comm_type: Any = None,
    extra_output: Tensor | None = None,
    bulk_overlap: bool = False,
    alpha: float = 1.0,
    beta: float | None = None,
) -> list[Any]:
    """D = op(B) op(A), in row-major terms: (D, gradient of the bias, input of the GELU, extra output)."""
    if gelu or comm_overlap is not None:
        raise NotImplementedError("generic_gemm with GELU or overlapped communication: not emulated")
    assert is_fp8(A) == is_fp8(B), "cuBLASLt multiplies FP8 with FP8 only"
    a, b = operand(A, rowwise=transA), operand(B, rowwise=not transB)
    left, right = b.t() if transB else b, a.t() if transA else a
    if is_fp8(A):
        check_sizes(left.shape[1], right.shape[1], is_block_scaled(A) or is_block_scaled(B))
    product = left @ right * alpha
    bias_grad = None
    if bias is not None and grad:
        bias_grad = b.sum(0).to(bias.dtype)
    elif bias is not None:
        product = product + bias.float()
    if D is not None:
        assert D.numel() == product.numel() and D.shape[-1] == product.shape[-1], (D.shape, product.shape)
        assert output_dtype is None or TORCH_DTYPE[DType(output_dtype)] == D.dtype
        flat = D.view(product.shape)
        flat.add_(product.to(D.dtype)) if accumulate else flat.copy_(product)
        return [D, bias_grad, None, extra_output]
    dtype = TORCH_DTYPE[DType(output_dtype)] if output_dtype is not None else A.dtype
    rows = (left.shape[0],) if transB else tuple(B.size()[:-1])
    output = product.to(dtype).view(*rows, product.shape[-1])
    return [output if quantizer is None else quantize(output, quantizer), bias_grad, None, extra_output]


def check_sizes(k: int, m: int, blocks: bool) -> None:
    """K of FP8 in units of 16 bytes; in blocks the output's rows as well, whose elements have at least 2."""
    assert k % 16 == 0, f"FP8 GEMM with K = {k}, which is no multiple of 16"
    assert not blocks or m % 8 == 0, f"FP8 GEMM in blocks with M = {m}, which is no multiple of 8"
