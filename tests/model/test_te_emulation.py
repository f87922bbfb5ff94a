"""What the emulated native module refuses, as cuBLAS and Hopper's GEMMs do, and what it says of what it has not."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformer_engine_emulation import native
from transformer_engine_emulation.enumerations import DType
from transformer_engine_emulation.quantization import tensor_cast

tex: Any = native.module()


def fp8(x: torch.Tensor, **changes: Any) -> Any:
    """A per-tensor quantised tensor's storage."""
    cast = tensor_cast(x, torch.tensor([8.0]), DType.kFloat8E4M3)
    fields = dict(_data=cast.rowwise, _scale_inv=cast.rowwise_scale_inv, _transpose=cast.columnwise)
    fields |= dict(_transpose_invalid=False, _fp8_dtype=DType.kFloat8E4M3, size=lambda: x.shape)
    return SimpleNamespace(**fields | changes)


def gemm(a: Any, b: Any, layout: str = "TN", **options: Any) -> Any:
    rest = [None, None, DType.kFloat32, None, DType.kBFloat16, False, None, False, None, 0, False, False]
    return tex.generic_gemm(a, layout[0] == "T", b, layout[1] == "T", *rest, **options)[0]


WEIGHT, ROWS = (torch.randn(*size, generator=torch.Generator().manual_seed(0)) for size in ((48, 32), (16, 32)))


@pytest.mark.parametrize("layout", ["TN", "NN", "NT"])
def test_products(layout: str) -> None:
    """Forward, gradient of the input, gradient of the weight: in FP8 close to what it is without."""
    gradient = torch.randn(16, 48, generator=torch.Generator().manual_seed(1))
    a, b, wanted = {
        "TN": (WEIGHT, ROWS, ROWS @ WEIGHT.t()),
        "NN": (WEIGHT, gradient, gradient @ WEIGHT),
        "NT": (ROWS, gradient, gradient.t() @ ROWS),
    }[layout]
    assert (gemm(a, b, layout) - wanted).abs().max() < 1e-5
    error = (gemm(fp8(a), fp8(b), layout) - wanted).norm() / wanted.norm()
    assert 1e-3 < error < 0.06


@pytest.mark.parametrize(
    ("a", "b", "layout", "said"),
    [
        (fp8(WEIGHT), ROWS, "TN", "FP8 with FP8 only"),
        (fp8(WEIGHT[:, :24]), fp8(ROWS[:, :24]), "TN", "K = 24"),
        (fp8(WEIGHT, _transpose=None), fp8(ROWS @ WEIGHT.t()), "NN", "no valid transpose"),
        (fp8(WEIGHT, _transpose_invalid=True), fp8(ROWS @ WEIGHT.t()), "NN", "no valid transpose"),
        (fp8(WEIGHT, _data=None), fp8(ROWS), "TN", "no rowwise data"),
    ],
)
def test_what_a_hopper_gemm_refuses(a: Any, b: Any, layout: str, said: str) -> None:
    with pytest.raises(AssertionError, match=said):
        gemm(a, b, layout)


def test_a_transpose_is_read_where_hopper_reads_it() -> None:
    """One that was not renewed shows in the product."""
    stale = fp8(WEIGHT, _transpose=fp8(2 * WEIGHT)._transpose)
    gradient = fp8(ROWS @ WEIGHT.t())
    assert torch.equal(gemm(stale, fp8(ROWS)), gemm(fp8(WEIGHT), fp8(ROWS)))
    assert not torch.equal(gemm(stale, gradient, "NN"), gemm(fp8(WEIGHT), gradient, "NN"))


def test_what_is_not_emulated_says_its_name() -> None:
    with pytest.raises(NotImplementedError, match=r"transformer_engine_torch\.moe_permute_fwd: not emulated"):
        tex.moe_permute_fwd(1, 2)
    with pytest.raises(NotImplementedError, match="GELU"):
        tex.generic_gemm(WEIGHT, True, ROWS, False, None, None, None, None, 4, True, None, False, None, 0, False, False)
