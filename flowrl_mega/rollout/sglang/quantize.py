"""Quantizes weights as DeepSeek's FP8 checkpoints do: blocks of 128 x 128 float8 values, one scale per block."""

from __future__ import annotations

import json
import re
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

BLOCK = 128
SCALE = "_scale_inv"  # suffix of a weight's scales, by which its blocks are multiplied
LARGEST = torch.finfo(torch.float8_e4m3fn).max
# For config.json, so that a server expects FP8.
QUANTIZATION: dict[str, Any] = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": [BLOCK, BLOCK],
}
_LINEAR = re.compile(r"model\.layers\.\d+\..+_proj\.weight")


def to_fp8(named: list[tuple[str, Tensor]]) -> list[tuple[str, Tensor]]:
    """The layers' linear weights in FP8, each followed by its scales, and all other tensors in bf16."""
    sent: list[tuple[str, Tensor]] = []
    for name, tensor in named:
        if _LINEAR.fullmatch(name):
            weight, scale = quantize(tensor)
            sent += [(name, weight), (name + SCALE, scale)]
        else:
            sent.append((name, tensor.to(torch.bfloat16)))
    return sent


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """`weight` [N, K] as float8_e4m3fn [N, K] and fp32 scales [ceil(N / 128), ceil(K / 128)].

    A block's largest magnitude becomes the largest float8 value; blocks at the edges may be smaller.
    """
    rows, columns = weight.shape
    padded = F.pad(weight.float(), (0, -columns % BLOCK, 0, -rows % BLOCK))
    blocks = padded.view(padded.shape[0] // BLOCK, BLOCK, -1, BLOCK)
    scale = blocks.abs().amax(dim=(1, 3)).clamp(min=1e-10) / LARGEST
    scaled = (blocks / scale[:, None, :, None]).clamp(-LARGEST, LARGEST)
    return scaled.to(torch.float8_e4m3fn).view(padded.shape)[:rows, :columns].contiguous(), scale


def with_quantization(side_files: dict[str, bytes]) -> dict[str, bytes]:
    """A model's side files, with `quantization_config` added to config.json."""
    config = json.loads(side_files["config.json"]) | {"quantization_config": QUANTIZATION}
    return side_files | {"config.json": json.dumps(config, indent=2).encode()}
